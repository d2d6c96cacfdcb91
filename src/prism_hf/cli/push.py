"""The command push: publish a folder on the Hub."""

import argparse
import sys
from pathlib import Path

from .options import Command, add_target, push_options, quiet


def push(parser: argparse.ArgumentParser) -> Command:
    """Publish a dataset, a teacher or a student on the Hub.

        %(prog)s outputs/NAME/dataset ORG/NAME [--public] [--revision BRANCH | --create-pr] [--replace]
        %(prog)s outputs/NAME/student ORG/STUDENT --dataset ORG/NAME

    Everything is published in one commit. The repo is private unless you use --public.
    """
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="DIR/dataset, a teacher folder, or DIR/student")
    parser.add_argument("repo", metavar="REPO", help="Hub id; the repo is created if it does not exist")
    parser.add_argument("--dataset", metavar="REPO", help="for a student: Hub id of the dataset it was trained on")
    add_target(parser)
    return _push


def _push(args: argparse.Namespace) -> None:
    quiet()
    from ..hub import Target, push_folder

    sys.stdout.write(f"{push_folder(args.folder, Target(args.repo, **push_options(args)), dataset_id=args.dataset).url}\n")
