"""The command export: convert a dataset for other programs."""

import argparse
import sys
from pathlib import Path

from .options import Command, quiet


def export(parser: argparse.ArgumentParser) -> Command:
    """Export the images of a dataset for other programs.

        %(prog)s outputs/NAME/dataset DIR --format imagefolder
        %(prog)s ORG/NAME DIR --format rethinkdc --revision v1

    imagefolder: one folder of image files per class. rethinkdc: one Parquet table with the columns that rethinkdc reads.
    ddranking: tensors of the images with one soft label each, as arguments of DD-Ranking's evaluators.
    """
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a dataset folder or a Hub id")
    parser.add_argument("target", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", required=True, choices=("imagefolder", "rethinkdc", "ddranking"), help="output format")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    return _export


def _export(args: argparse.Namespace) -> None:
    quiet()
    from ..dataset.export import export

    sys.stdout.write(f"{export(args.source, args.target, format=args.format, revision=args.revision)}\n")
