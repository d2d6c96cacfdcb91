"""Train the `squeeze:` teachers of a recipe.

    %(prog)s RECIPE.yaml [key=value ...] [--output DIR]

They learn the recipe's real data; finished ones are left as they are. Prints a folder per teacher, which both
`timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers'
`AutoModelForImageClassification.from_pretrained("FOLDER")` load.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ..errors import RecipeError
from ..runtime import is_first_process
from .options import add_compute, quiet, read_recipe, split_overrides


def add_options(parser: argparse.ArgumentParser) -> None:
    """Recipe and folder."""
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    default = Path("outputs/teachers")
    parser.add_argument("--output", type=Path, default=default, metavar="DIR", help=f"default: {default}")
    add_compute(parser)


def run(args: argparse.Namespace) -> None:
    """Train the teachers, and print their folders."""
    recipe = read_recipe(args.words)
    if not recipe.squeezed_teachers:
        (path,), _ = split_overrides(args.words)
        raise RecipeError(f"{path} names no `squeeze:` teacher, so there is nothing to train")
    quiet()
    from ..models import teacher_folder
    from ..run.context import Run, make_accelerator
    from ..run.folder import check_place
    from ..run.preflight import check_architectures
    from ..run.squeeze import squeeze

    check_place(args.output, "--output")
    check_architectures(recipe)
    accelerator = make_accelerator(threads=args.threads)
    # Only later stages need the folder of a run; teachers go straight to the output.
    scratch = args.output / f".work-{recipe.name}"
    squeeze(Run(recipe, scratch, args.output, accelerator, args.checkpoint_every))
    if is_first_process():
        shutil.rmtree(scratch, ignore_errors=True)
        for name in recipe.squeezed_teachers:
            sys.stdout.write(f"{name}  {teacher_folder(name, recipe, args.output)}\n")
