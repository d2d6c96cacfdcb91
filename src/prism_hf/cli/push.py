"""Publish a dataset, a teacher or a student on the Hub.

    %(prog)s outputs/NAME/dataset ORG/NAME [--public] [--revision BRANCH | --create-pr] [--replace]
    %(prog)s outputs/NAME/student ORG/STUDENT --dataset ORG/NAME

One commit brings all of it or nothing. The repo is private unless --public.
"""

import argparse
import sys
from pathlib import Path

from .options import add_target, quiet, target_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Folder and repo."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a dataset (DIR/dataset), a teacher, or DIR/student")
    parser.add_argument("repo", metavar="REPO", help="Hub id, created if it does not exist")
    parser.add_argument("--dataset", metavar="REPO", help="of a student: Hub id of the dataset that it learned from")
    add_target(parser)


def run(args: argparse.Namespace) -> None:
    """Publish the folder, and print the address of the commit."""
    quiet()
    from ..hub import push_folder

    sys.stdout.write(f"{push_folder(args.folder, target_of(args.repo, args), dataset_id=args.dataset).url}\n")
