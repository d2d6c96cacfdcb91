"""The commands status, evaluate, push, verify and export: on what a run left."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import RecipeError
from ..runtime import is_first_process
from .options import Command, add_compute, add_target, push_options, quiet, split_overrides


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


def evaluate(parser: argparse.ArgumentParser) -> Command:
    """Train students on a distilled dataset, and print the table.

        %(prog)s DATASET
        %(prog)s DATASET --student resnet18 --seeds 3 evaluation.epochs=100
        %(prog)s DATASET --test DATA:SPLIT

    DATASET is a folder or a Hub id. Students see only what it contains: images, labels, views. The test data are the
    recipe's unless named. The random-real rows appear when the real training data and the teachers can be reached
    (--teachers DIR for squeezed ones).
    """
    parser.add_argument("words", nargs="+", metavar="DATASET | evaluation.key=value", help="a folder or a Hub id")
    parser.add_argument("--revision", help="of a Hub dataset")
    parser.add_argument("--student", metavar="NAME", help="timm architecture, or transformers:MODEL_TYPE")
    parser.add_argument("--test", metavar="DATA[:SPLIT]", help="test data: Hub id or folder; split `test` if not named")
    parser.add_argument("--seeds", type=int, metavar="N", help="students per row")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="default: those beside DATASET, or outputs/teachers")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/evaluate/<recipe name>")
    add_compute(parser)
    return _evaluate


def _evaluate(args: argparse.Namespace) -> None:
    sources, overrides = split_overrides(args.words)
    if len(sources) != 1:
        raise RecipeError(f"expected one dataset, got {len(sources)}; protocol changes are written evaluation.key=value")
    if args.seeds is not None:
        if args.seeds < 1:
            raise RecipeError(f"--seeds is {args.seeds}; expected at least 1")
        overrides.append(f"evaluation.seeds={list(range(args.seeds))}")
    if args.student is not None:
        overrides.append(f"evaluation.student={json.dumps(args.student)}")
    quiet()
    from ..evaluation import summary
    from ..run.evaluate_dataset import evaluate_dataset

    report, student = evaluate_dataset(
        sources[0],
        overrides,
        revision=args.revision,
        test=args.test,
        teachers=args.teachers,
        folder=args.output,
        threads=args.threads,
        checkpoint_s=args.checkpoint_every,
    )
    if is_first_process():
        sys.stdout.write(f"{summary(json.loads(report.read_text(encoding='utf-8')))}\nreport: {report}\n")
        if student is not None:
            sys.stdout.write(f"student: {student}\n")


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


def verify(parser: argparse.ArgumentParser) -> Command:
    """Compare every file of a dataset with provenance.json.

        %(prog)s outputs/NAME/dataset
        %(prog)s ORG/NAME --revision v1

    The exit code is 1 if anything differs.
    """
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a dataset folder, or a Hub id")
    parser.add_argument("--revision", help="of a Hub dataset")
    return _verify


def _verify(args: argparse.Namespace) -> int:
    quiet()
    from ..dataset.provenance import verify

    result = verify(args.source, revision=args.revision)
    sys.stdout.writelines(f"{line}\n" for line in result.differences)
    rows = ", ".join(f"{count} rows in {config!r}" for config, count in result.rows.items())
    sys.stdout.write(f"{args.source}: {result.files} files, {rows}; {len(result.differences) or 'no'} differences\n")
    return 1 if result.differences else 0


def export(parser: argparse.ArgumentParser) -> Command:
    """Write the images of a dataset for other programs.

        %(prog)s outputs/NAME/dataset DIR --format imagefolder
        %(prog)s ORG/NAME DIR --format rethinkdc --revision v1

    imagefolder: a folder of image files per class. rethinkdc: one Parquet table with the columns that rethinkdc reads.
    """
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a dataset folder, or a Hub id")
    parser.add_argument("target", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--format", required=True, choices=("imagefolder", "rethinkdc"))
    parser.add_argument("--revision", help="of a Hub dataset")
    return _export


def _export(args: argparse.Namespace) -> None:
    quiet()
    from ..dataset.export import export

    sys.stdout.write(f"{export(args.source, args.target, format=args.format, revision=args.revision)}\n")
