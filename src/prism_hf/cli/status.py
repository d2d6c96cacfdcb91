"""The command status: what a run has done, and what is left."""

import argparse
import sys
from pathlib import Path

from .options import Command


def status(parser: argparse.ArgumentParser) -> Command:
    """Print what a run has done and what it still has to do.

        %(prog)s outputs/digits-prism-ipc10

    Reads the run's output folder only, so it may be asked at any time. The last line is the same as JSON.
    """
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a run")
    return lambda args: print_status(args.folder)


def print_status(folder: Path) -> None:
    """Print the state of the run in a folder."""
    from ..run.status import status_text, survey

    sys.stdout.write(status_text(survey(folder)) + "\n")
