"""The command push: a folder to the Hub."""

import argparse
import sys
from pathlib import Path

from .options import Command, add_target, push_options, quiet


def push(parser: argparse.ArgumentParser) -> Command:
    """Publish a dataset, a teacher or a student on the Hub.

        %(prog)s outputs/NAME/dataset ORG/NAME [--public] [--revision BRANCH | --create-pr] [--replace]
        %(prog)s outputs/NAME/student ORG/STUDENT --dataset ORG/NAME

    One commit brings all of it or nothing. The repo is private unless --public.
    """
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a dataset (DIR/dataset), a teacher, or DIR/student")
    parser.add_argument("repo", metavar="REPO", help="Hub id, created if it does not exist")
    parser.add_argument("--dataset", metavar="REPO", help="of a student: Hub id of the dataset that it learned from")
    add_target(parser)
    return _push


def _push(args: argparse.Namespace) -> None:
    quiet()
    from ..hub import Target, push_folder

    sys.stdout.write(f"{push_folder(args.folder, Target(args.repo, **push_options(args)), dataset_id=args.dataset).url}\n")
