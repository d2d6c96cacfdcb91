"""Compare every file of a dataset with provenance.json.

    %(prog)s outputs/NAME/dataset
    %(prog)s ORG/NAME --revision v1

The exit code is 1 if anything differs.
"""

import argparse
import sys

from .options import quiet


def add_options(parser: argparse.ArgumentParser) -> None:
    """The dataset."""
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a dataset folder, or a Hub id")
    parser.add_argument("--revision", help="of a Hub dataset")


def run(args: argparse.Namespace) -> int:
    """Print what differs."""
    quiet()
    from ..dataset.verify import verify

    result = verify(args.source, revision=args.revision)
    for line in result.differences:
        sys.stdout.write(f"{line}\n")
    rows = ", ".join(f"{count} rows in {config!r}" for config, count in result.rows.items())
    sys.stdout.write(f"{args.source}: {result.files} files, {rows}; {len(result.differences) or 'no'} differences\n")
    return 1 if result.differences else 0
