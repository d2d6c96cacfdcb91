"""Print what a run has done and what it still has to do.

    %(prog)s outputs/digits-prism-ipc10

Reads the run's output folder only, so it may be asked at any time. The last line is the same as JSON.
"""

import argparse
import sys
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a run")


def run(args: argparse.Namespace) -> None:
    """Print the state of a run."""
    print_status(args.folder)


def print_status(folder: Path) -> None:
    """Print the state of the run in a folder."""
    from ..run.status import status_text, survey

    sys.stdout.write(status_text(survey(folder)) + "\n")
