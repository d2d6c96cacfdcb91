"""The command evaluate: train students on a distilled dataset."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import RecipeError
from ..recipe import load_recipe
from ..run.folder import check_place
from ..runtime import folder_or_hub_id, in_processes, is_first_process, read_json
from .options import NO_CONTROL, Command, add_compute, processes, quiet, split_overrides


def evaluate(parser: argparse.ArgumentParser) -> Command:
    """Train students on a distilled dataset and print the results.

        %(prog)s DATASET
        %(prog)s DATASET --student resnet18 --seeds 3 evaluation.epochs=100
        %(prog)s DATASET --test DATA:SPLIT

    DATASET is a folder or a Hub id. Students are trained only on its images, labels and views. The test data is that of
    the recipe unless --test is given. The table has rows for random real images if the real training data and the
    teachers are available (--teachers DIR for squeezed ones).
    """
    parser.add_argument("words", nargs="+", metavar="DATASET | evaluation.key=value", help="folder or Hub id; overrides")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    parser.add_argument("--student", metavar="NAME", help="student: timm architecture or transformers:MODEL_TYPE")
    parser.add_argument("--test", metavar="DATA[:SPLIT]", help="test data: Hub id or folder; default split: test")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of students (seeds) per row")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="default: next to DATASET, or outputs/teachers")
    parser.add_argument("--output", type=Path, metavar="DIR", help="output folder; default: outputs/evaluate/<recipe name>")
    parser.add_argument("--no-control", dest="control", action="store_false", help=NO_CONTROL)
    add_compute(parser)
    return _evaluate


def _evaluate(args: argparse.Namespace) -> None:
    sources, overrides = split_overrides(args.words)
    if len(sources) != 1:
        raise RecipeError(f"expected one dataset, got {len(sources)}; write overrides as evaluation.key=value")
    if args.seeds is not None:
        if args.seeds < 1:
            raise RecipeError(f"--seeds is {args.seeds}; expected at least 1")
        overrides.append(f"evaluation.seeds={list(range(args.seeds))}")
    if args.student is not None:
        overrides.append(f"evaluation.student={json.dumps(args.student)}")
    give = "a folder with data/ and views/, as prism-hf writes it, or a Hub id"
    folder_or_hub_id(sources[0], f"distilled dataset {sources[0]!r}", give=give)
    if args.output is not None:
        check_place(args.output, "--output")
    quiet()
    from ..evaluation import summary
    from ..run.evaluate_dataset import evaluate_dataset

    with in_processes(processes(args, _size(sources[0]), args.output / "work" if args.output else None)):
        report, student = evaluate_dataset(
            sources[0],
            overrides,
            revision=args.revision,
            test=args.test,
            teachers=args.teachers,
            folder=args.output,
            control=args.control,
            threads=args.threads,
            checkpoint_s=args.checkpoint_every,
        )
    if is_first_process():
        sys.stdout.write(f"{summary(read_json(report))}\nreport: {report}\n")
        if student is not None:
            sys.stdout.write(f"student: {student}\n")


def _size(source: str) -> int | None:
    """Return the side of a dataset's images in pixels, if it is a folder; what is on the Hub is not known yet."""
    path = Path(source) / "recipe.yaml"
    return load_recipe(path).data.size if path.is_file() else None
