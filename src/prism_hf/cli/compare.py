"""Compare methods on your data: several recipes, one protocol.

    %(prog)s recipes/digits/prism_ipc10.yaml recipes/digits/sre2l_ipc10.yaml
    %(prog)s A.yaml B.yaml --data ORG/NAME          # a Hub id, or a folder
    %(prog)s A.yaml B.yaml --seeds 0,1,2 --students resnet18,mobilenetv3_small_050
    %(prog)s A.yaml B.yaml --dry-run                # what would be run

Data, teachers' training, labels, packaging and students are those of the first recipe, its size and channels too (change
them with data.size=64 data.channels=3). Random real images are always among the methods. Leaves comparison.html (one
file, for a browser), comparison.md, comparison.json and the runs, each with its dataset. The same command resumes an
interrupted comparison, with any number of processes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..recipe import load_recipe, override_recipe, plan_jobs
from .options import add_compute, quiet, split_overrides, teachers_folder

if TYPE_CHECKING:
    from ..compare.methods import Method, StudentSetup


def add_options(parser: argparse.ArgumentParser) -> None:
    """Recipes, data, seeds, students and folders."""
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="recipes, and overrides for all")
    parser.add_argument("--data", metavar="HUB_ID_OR_FOLDER", help="your data, in place of the first recipe's")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="one run of each; default: evaluation.seeds")
    parser.add_argument("--students", metavar="NAME,NAME,...", help="architectures; default: evaluation.student")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/compare-<name of the first recipe>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="where squeezed teachers are kept")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and stop")
    add_compute(parser)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different whole numbers with commas between, got {text!r}")
    return seeds


def run(args: argparse.Namespace) -> None:
    """Compare, or print what would be run."""
    paths, overrides = split_overrides(args.words)
    if not paths:
        raise RecipeError("expected at least one recipe, got none; give the path of a YAML file")
    recipes = [load_recipe(path) for path in paths]
    from ..compare.methods import StudentSetup, under_one_protocol

    if args.data is not None:
        quiet()
        from ..compare.compare_recipes import with_data

        overrides = with_data(recipes[0], args.data, overrides)
    recipes = [override_recipe(recipe, overrides) for recipe in recipes]
    methods, notes = under_one_protocol([(recipe.name, recipe) for recipe in recipes])
    seeds = args.seeds or list(recipes[0].evaluation.seeds)
    students = [recipes[0].evaluation.student] if args.students is None else args.students.split(",")
    setups = [StudentSetup(student, labels) for student in dict.fromkeys(students) for labels in ("soft", "hard")]
    if args.dry_run:
        sys.stdout.write(describe(methods, notes, seeds, setups))
        return
    quiet()
    from ..compare.compare_recipes import compare_recipes
    from ..compare.page import table_of
    from ..evaluation import plain_table

    folder = args.output or Path("outputs") / f"compare-{recipes[0].name}"
    comparison = compare_recipes(
        methods,
        setups,
        seeds,
        folder,
        teachers=teachers_folder(args, folder),
        notes=notes,
        command=" ".join([args.parser.prog, *map(public_word, args.argv)]),
        threads=args.threads,
        checkpoint_s=args.checkpoint_every,
    )
    if comparison is not None:
        sys.stdout.write(f"{plain_table(table_of(comparison))}\npage: {folder / 'comparison.html'}\n")


def describe(methods: Sequence[Method], notes: Sequence[str], seeds: Sequence[int], setups: Sequence[StudentSetup]) -> str:
    """What would be run."""
    lines = [f"{len(methods)} methods, {len(seeds)} seeds: {len(methods) * len(seeds)} runs"]
    for method in methods:
        steps = sum(job.iterations for job in plan_jobs(method.recipe))
        lines.append(f"  {method.label}: {method.recipe.num_images} images, {steps:,} steps")
    lines.append("students: " + ", ".join(f"{setup.student} ({setup.key} labels)" for setup in setups))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


_ABSOLUTE_PATH = re.compile(r"""(?<![\w./~-])/(?!/)[^,\]"']*""")
"""Alone or inside an option, an override or a list; not an address."""


def public_word(word: str) -> str:
    """A word of the command as a shell reads it, without the folders of this machine."""
    return shlex.quote(_ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name, word))
