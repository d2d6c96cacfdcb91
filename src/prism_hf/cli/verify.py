"""The command verify: check a dataset against its provenance."""

import argparse
import sys

from ..runtime import count_text
from .options import Command, quiet


def verify(parser: argparse.ArgumentParser) -> Command:
    """Check every file of a dataset against provenance.json.

        %(prog)s outputs/NAME/dataset
        %(prog)s ORG/NAME --revision v1

    Prints one line per difference. The exit code is 1 if there is any.
    """
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a dataset folder or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    return _verify


def _verify(args: argparse.Namespace) -> int:
    quiet()
    from ..dataset.provenance import verify

    result = verify(args.source, revision=args.revision)
    sys.stdout.writelines(f"{line}\n" for line in result.differences)
    rows = ", ".join(f"{count_text(count, 'row')} in {config!r}" for config, count in result.rows.items())
    differences = count_text(len(result.differences), "difference") if result.differences else "no differences"
    sys.stdout.write(f"{args.source}: {count_text(result.files, 'file')}, {rows}; {differences}\n")
    return 1 if result.differences else 0
