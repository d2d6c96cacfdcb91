"""Train the `squeeze:` teachers of a recipe on its data set, and store them for timm and transformers.

    accelerate launch recipes/squeeze.py RECIPE.yaml [key=value ...] [--output DIR]

Prints a folder per teacher; `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers'
`AutoModelForImageClassification.from_pretrained("FOLDER")` both load it. Finished teachers are left as they are.
"""

import argparse
import shutil
import sys
from pathlib import Path

# Python puts this folder first on its path, where our evaluate.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.cli.options import add_common, quiet, run_command, split_overrides
from prism_hf.errors import RecipeError
from prism_hf.recipe.yaml_file import load_recipe


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="a recipe, and overrides")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/teachers"), metavar="DIR", help="default: outputs/teachers"
    )
    add_common(parser)
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> None:
    paths, overrides = split_overrides(args.words)
    if len(paths) != 1:
        raise RecipeError(f"expected one recipe, got {len(paths)}; overrides are written key=value")
    recipe = load_recipe(paths[0], overrides)
    if not recipe.squeezed_teachers:
        raise RecipeError(f"{paths[0]} names no `squeeze:` teacher, so there is nothing to train")
    quiet()
    from prism_hf.models.squeeze import teacher_folder
    from prism_hf.run.context import Run, check_place, make_accelerator
    from prism_hf.run.preflight import check_architectures
    from prism_hf.run.stages import Stages

    check_place(args.output, "--output")
    check_architectures(recipe)
    accelerator = make_accelerator(threads=args.threads)
    # The run folder is only needed by later stages; teachers go straight to the output.
    scratch = args.output / f".work-{recipe.name}"
    Stages(Run(recipe, scratch, args.output, accelerator, args.checkpoint_every)).squeeze()
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        for name in recipe.squeezed_teachers:
            sys.stdout.write(f"{name}  {teacher_folder(name, recipe, args.output)}\n")


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
