"""The command squeeze: train only the teachers of a recipe."""

import argparse
import shutil
import sys
from pathlib import Path

from ..errors import RecipeError
from ..run.folder import check_place, check_source
from ..runtime import in_processes, is_first_process
from .options import Command, add_compute, processes, quiet, read_recipe, split_overrides


def squeeze(parser: argparse.ArgumentParser) -> Command:
    """Train the `squeeze:` teachers of a recipe.

        %(prog)s RECIPE.yaml [key=value ...] [--teachers DIR]

    Teachers are trained on the recipe's real data; finished ones are not trained again. Prints the folder of each teacher.
    Load it with `timm.create_model("local-dir:FOLDER", pretrained=True)` or, in transformers, with
    `AutoModelForImageClassification.from_pretrained("FOLDER")`.
    """
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    default = Path("outputs/teachers")
    text = "folder of squeezed teachers, as in `distill`; default: %(default)s"
    # --output is the older name.
    parser.add_argument("--teachers", "--output", type=Path, default=default, metavar="DIR", help=text)
    add_compute(parser)
    return _squeeze


def _squeeze(args: argparse.Namespace) -> None:
    recipe = read_recipe(args.words)
    if not recipe.squeezed_teachers:
        (path,), _ = split_overrides(args.words)
        raise RecipeError(f"{path} does not name a `squeeze:` teacher, so there is nothing to train")
    check_source(recipe.data.source, "data.source")
    check_place(args.teachers, "--teachers")
    quiet()
    from ..models import teacher_folder
    from ..run.context import Run, make_accelerator
    from ..run.preflight import check_architectures, check_data
    from ..run.squeeze import squeeze
    from ..run.threads import use_threads

    check_architectures(recipe)
    # Only later stages need the folder of a run; teachers are written directly to the output.
    scratch = args.teachers / f".work-{recipe.name}"
    with in_processes(processes(args, recipe.data.size, scratch / "work")):
        run = Run(recipe, scratch, args.teachers, make_accelerator(), args.checkpoint_every)
        notes = check_data(run)
        use_threads(run.accelerator, run.work, args.threads)
        for line in notes:
            run.say(line)
        squeeze(run)
    if is_first_process():
        shutil.rmtree(scratch, ignore_errors=True)
        for name in recipe.squeezed_teachers:
            sys.stdout.write(f"{name}  {teacher_folder(name, recipe, args.teachers)}\n")
