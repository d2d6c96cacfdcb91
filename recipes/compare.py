"""Compare methods on your data: several recipes under one protocol, beside random real images.

    accelerate launch recipes/compare.py recipes/digits/prism_ipc10.yaml recipes/digits/sre2l_ipc10.yaml
    accelerate launch recipes/compare.py A.yaml B.yaml --data ORG/NAME          # a Hub id, or a folder
    accelerate launch recipes/compare.py A.yaml B.yaml --seeds 0,1,2 --students resnet18,mobilenetv3_small_050
    accelerate launch recipes/compare.py A.yaml B.yaml --dry-run                # what would be run

Data, teachers' training, labels, packaging and students are those of the first recipe, its size and channels too (change
them with data.size=64 data.channels=3). Random real images are always among the methods. Leaves comparison.html (one
file, for a browser), comparison.md, comparison.json and the runs, each with its data set. The same command goes on where
an interrupted one stopped, with any number of processes.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts this folder first on its path, where our evaluate.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from prism_hf.cli.options import add_common, quiet, run_command, split_overrides
from prism_hf.errors import RecipeError
from prism_hf.recipe.plan import plan_jobs
from prism_hf.recipe.schema import Recipe
from prism_hf.recipe.yaml_file import load_recipe, override_recipe

if TYPE_CHECKING:
    from prism_hf.compare.methods import Method, StudentSetup
    from prism_hf.compare.runs import Comparison


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="recipes, and overrides for all")
    parser.add_argument("--data", metavar="HUB_ID_OR_FOLDER", help="your data, in place of the first recipe's")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="one run of each; default: evaluation.seeds")
    parser.add_argument("--students", metavar="NAME,NAME,...", help="architectures; default: evaluation.student")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/compare-<name of the first recipe>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="where squeezed teachers are kept")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and stop")
    add_common(parser)
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> None:
    paths, overrides = split_overrides(args.words)
    if not paths:
        raise RecipeError("expected at least one recipe, got none; give the path of a YAML file")
    recipes = [load_recipe(path) for path in paths]
    quiet()
    from prism_hf.compare.methods import StudentSetup, under_one_protocol

    if args.data is not None:
        overrides = _on(recipes[0], args.data, overrides)
    recipes = [override_recipe(recipe, overrides) for recipe in recipes]
    methods, notes = under_one_protocol([(recipe.name, recipe) for recipe in recipes])
    seeds = args.seeds or list(recipes[0].evaluation.seeds)
    students = [recipes[0].evaluation.student] if args.students is None else args.students.split(",")
    readings = [StudentSetup(student, labels) for student in dict.fromkeys(students) for labels in ("soft", "hard")]
    if args.dry_run:
        sys.stdout.write(describe(methods, notes, seeds, readings))
        return
    folder = args.output or Path("outputs") / f"compare-{recipes[0].name}"
    teachers = args.teachers or (folder / "teachers" if args.output else Path("outputs") / "teachers")
    compare(methods, notes, readings, seeds, folder, teachers, args)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different whole numbers with commas between, got {text!r}")
    return seeds


def _on(first: Recipe, source: str, overrides: list[str]) -> list[str]:
    """Overrides for all recipes: other data. What the first says of its own (columns, revision, classes) does not hold."""
    from prism_hf.images.source import count_classes

    words = [f"data.{key}=null" for key in ("config", "revision", "image_column", "label_column")]
    words += ["data.licence=unknown", f"data.source={json.dumps(source)}"]
    # Columns and splits may be named on the command line; the rest waits for the number of classes.
    data = override_recipe(first, [*words, *(word for word in overrides if word.startswith("data."))]).data
    # The section as a whole: the other recipes may read splits or columns that are not here.
    found = dataclasses.asdict(data) | {"num_classes": count_classes(data)}
    return [f"data={json.dumps(found, ensure_ascii=False)}", *overrides]


def describe(methods: "list[Method]", notes: list[str], seeds: list[int], readings: "list[StudentSetup]") -> str:
    """What would be run."""
    lines = [f"{len(methods)} methods, {len(seeds)} seeds: {len(methods) * len(seeds)} runs"]
    for method in methods:
        steps = sum(job.iterations for job in plan_jobs(method.recipe))
        lines.append(f"  {method.label}: {method.recipe.num_images} images, {steps:,} steps")
    lines.append("students: " + ", ".join(f"{reading.student} ({reading.key} labels)" for reading in readings))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


def compare(
    methods: "list[Method]",
    notes: list[str],
    readings: "list[StudentSetup]",
    seeds: list[int],
    folder: Path,
    teachers: Path,
    args: argparse.Namespace,
) -> None:
    from prism_hf.compare.runs import Comparison, check_comparison_folder
    from prism_hf.run.context import make_accelerator
    from prism_hf.runtime.lock import check_free, locked
    from prism_hf.runtime.logs import log_file
    from prism_hf.runtime.store import clear_drafts

    check_comparison_folder(folder)
    if os.environ.get("RANK", "0") == "0":  # the others would find the folder held by the first
        check_free(folder)
    accelerator = make_accelerator(threads=args.threads)
    made = Comparison(
        methods,
        readings,
        seeds,
        folder=folder,
        teachers_root=teachers,
        accelerator=accelerator,
        checkpoint_s=args.checkpoint_every,
    )
    made.check()
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(folder))
            # Not below DIR/teachers: other runs may be at work there.
            for name in (".", "cells", "full", "assets", "work"):
                clear_drafts(folder / name, deep=name == "full")
        accelerator.wait_for_everyone()
        stack.enter_context(log_file(folder, accelerator.process_index))
        made()
        if accelerator.is_main_process:
            show(made, notes, folder)
        accelerator.end_training()


def show(made: "Comparison", notes: list[str], folder: Path) -> None:
    """Write the page, and say where it is."""
    from prism_hf.compare.findings import write_page
    from prism_hf.compare.page import table_of
    from prism_hf.evaluation.report import plain_table

    command = " ".join(["accelerate launch recipes/compare.py", *map(_shown, sys.argv[1:])])
    comparison = write_page(made, notes=notes, command=command)
    sys.stdout.write(f"{plain_table(table_of(comparison))}\npage: {folder / 'comparison.html'}\n")


_PLACE = re.compile(r"""(?<![\w./~-])/(?!/)[^,\]"']*""")
"""An absolute path, alone or inside an option, an override or a list; no address."""


def _shown(word: str) -> str:
    """A word of the command as a shell reads it, without what it says of this machine."""
    return shlex.quote(_PLACE.sub(lambda found: Path(found[0]).name, word))


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
