"""The command status: the finished and remaining work of a run."""

import argparse
import sys
from pathlib import Path

from .options import Command


def status(parser: argparse.ArgumentParser) -> Command:
    """Show how much of a run is finished and how much is left.

        %(prog)s outputs/digits-prism-ipc10

    Reads only the output folder, so you can use it while the run is active. The last line is the same status as JSON.
    """
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a run")
    return lambda args: print_status(args.folder)


def print_status(folder: Path) -> None:
    """Print the status of the run in a folder."""
    from ..run.status import status_text, survey

    sys.stdout.write(status_text(survey(folder)) + "\n")
