"""The command `prism-hf`: share what a run left, check what was shared, and hand it to other programs.

    prism-hf push FOLDER REPO [--public] [--revision BRANCH | --create-pr] [--replace]
    prism-hf verify FOLDER_OR_REPO [--revision REVISION]
    prism-hf export FOLDER_OR_REPO DIR --format imagefolder|rethinkdc [--revision REVISION]

FOLDER is a data set (DIR/dataset), a squeezed teacher or a student (DIR/student).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import add_debug, add_target, quiet, run_command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line -> its options, with the command to run in `run`."""
    parser = argparse.ArgumentParser("prism-hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pusher = commands.add_parser("push", help="publish a folder in one commit")
    pusher.add_argument("folder", type=Path, metavar="FOLDER")
    pusher.add_argument("repo", metavar="REPO", help="Hub id, made if it is not there")
    pusher.add_argument("--dataset", metavar="REPO", help="of a student: Hub id of the data set that it learned from")
    add_target(pusher)
    pusher.set_defaults(run=push)
    verifier = commands.add_parser("verify", help="compare every file with provenance.json")
    verifier.add_argument("source", metavar="FOLDER_OR_REPO")
    verifier.add_argument("--revision", help="of a Hub data set")
    verifier.set_defaults(run=verify)
    exporter = commands.add_parser("export", help="write the images as other programs expect them")
    exporter.add_argument("source", metavar="FOLDER_OR_REPO")
    exporter.add_argument("target", type=Path, metavar="DIR", help="new folder")
    exporter.add_argument("--format", required=True, choices=("imagefolder", "rethinkdc"))
    exporter.add_argument("--revision", help="of a Hub data set")
    exporter.set_defaults(run=export)
    for command in (pusher, verifier, exporter):
        add_debug(command)
    return parser.parse_args(argv)


def push(args: argparse.Namespace) -> None:
    """Publish a folder."""
    from ..hub.push import push_folder
    from ..hub.repository import Target

    to = Target(args.repo, public=args.public, revision=args.revision, create_pr=args.create_pr, replace_other=args.replace)
    sys.stdout.write(f"{push_folder(args.folder, to, dataset_id=args.dataset).url}\n")


def verify(args: argparse.Namespace) -> int:
    """Say what differs from provenance.json; the exit code is 1 if anything does."""
    from ..dataset.verify import verify as check

    found = check(args.source, revision=args.revision)
    for line in found.differences:
        sys.stdout.write(f"{line}\n")
    rows = ", ".join(f"{count} rows in {config!r}" for config, count in found.rows.items())
    sys.stdout.write(f"{args.source}: {found.files} files, {rows}; {len(found.differences) or 'no'} differences\n")
    return 1 if found.differences else 0


def export(args: argparse.Namespace) -> None:
    """Write the images for another program."""
    from ..dataset.export import export as write

    sys.stdout.write(f"{write(args.source, args.target, format=args.format, revision=args.revision)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = parse(argv)
    quiet()
    return run_command(args.run, args)
