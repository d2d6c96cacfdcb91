"""The command squeeze: train only the teachers of a recipe."""

import argparse
import shutil
import sys
from pathlib import Path

from ..errors import RecipeError
from ..runtime import is_first_process
from .options import Command, add_compute, quiet, read_recipe, split_overrides


def squeeze(parser: argparse.ArgumentParser) -> Command:
    """Train the `squeeze:` teachers of a recipe.

        %(prog)s RECIPE.yaml [key=value ...] [--output DIR]

    Teachers are trained on the recipe's real data; finished ones are not trained again. Prints the folder of each teacher.
    Load it with `timm.create_model("local-dir:FOLDER", pretrained=True)` or, in transformers, with
    `AutoModelForImageClassification.from_pretrained("FOLDER")`.
    """
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    parser.add_argument("--output", type=Path, default="outputs/teachers", metavar="DIR", help="default: %(default)s")
    add_compute(parser)
    return _squeeze


def _squeeze(args: argparse.Namespace) -> None:
    recipe = read_recipe(args.words)
    if not recipe.squeezed_teachers:
        (path,), _ = split_overrides(args.words)
        raise RecipeError(f"{path} does not name a `squeeze:` teacher, so there is nothing to train")
    quiet()
    from ..models import teacher_folder
    from ..run.context import Run, make_accelerator
    from ..run.folder import check_place
    from ..run.preflight import check_architectures, check_data
    from ..run.squeeze import squeeze
    from ..run.threads import use_threads

    check_place(args.output, "--output")
    check_architectures(recipe)
    # Only later stages need the folder of a run; teachers are written directly to the output.
    scratch = args.output / f".work-{recipe.name}"
    run = Run(recipe, scratch, args.output, make_accelerator(), args.checkpoint_every)
    notes = check_data(run)
    use_threads(run.accelerator, run.work, args.threads)
    for line in notes:
        run.say(line)
    squeeze(run)
    if is_first_process():
        shutil.rmtree(scratch, ignore_errors=True)
        for name in recipe.squeezed_teachers:
            sys.stdout.write(f"{name}  {teacher_folder(name, recipe, args.output)}\n")
