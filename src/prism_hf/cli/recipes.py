"""The command recipes: list or print the recipes that come with prism-hf."""

import argparse
import sys

from ..errors import RecipeError
from ..recipe import shipped_recipes, title_of
from .options import Command


def recipes(parser: argparse.ArgumentParser) -> Command:
    """List the shipped recipes, or print one.

        %(prog)s
        %(prog)s your_data/prism_ipc10 > my_recipe.yaml    # a copy to edit

    Every command that takes the path of a recipe also accepts these names.
    """
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the YAML of this recipe")
    return _recipes


def _recipes(args: argparse.Namespace) -> None:
    shipped = shipped_recipes()
    if args.name is None:
        width = max(map(len, shipped))
        sys.stdout.writelines(f"{name:<{width}}  {title_of(path)}\n" for name, path in shipped.items())
    elif args.name in shipped:
        sys.stdout.write(shipped[args.name].read_text(encoding="utf-8"))
    else:
        raise RecipeError(f"{args.name!r} is not a shipped recipe; `prism-hf recipes` lists them")
