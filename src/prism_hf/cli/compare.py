"""The command compare: compare methods under one protocol."""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..compare import Method, under_one_protocol
from ..errors import RecipeError
from ..recipe import Recipe, load_recipe, override_recipe, plan_jobs
from ..run.folder import check_place, check_source
from ..runtime import count_text, in_processes
from .options import Command, add_compute, processes, quiet, split_overrides, teachers_folder


def compare(parser: argparse.ArgumentParser) -> Command:
    """Compare methods on your data: several recipes, one protocol.

        %(prog)s recipes/digits/prism_ipc10.yaml recipes/digits/sre2l_ipc10.yaml
        %(prog)s A.yaml B.yaml --data ORG/NAME          # a Hub id, or a folder
        %(prog)s A.yaml B.yaml --seeds 0,1,2 --students resnet18,mobilenetv3_small_050
        %(prog)s A.yaml B.yaml --teacher-seeds 0,1,2    # three sets of squeezed teachers; intervals are over them
        %(prog)s A.yaml B.yaml --dry-run                # print the plan and stop

    All methods use the data, image size, channels, teacher training, labels, packaging and students of the first recipe.
    Overrides apply to all methods (data.size=64 data.channels=3). Random real images are always included as a baseline.
    The output is comparison.html (a single file for a browser), comparison.md, comparison.json, and the runs with their
    datasets. Run the same command again, with any number of processes, to resume an interrupted comparison.
    """
    parser.add_argument("words", nargs="+", metavar="RECIPE.yaml | key=value", help="recipes and overrides for all of them")
    parser.add_argument("--data", metavar="HUB_ID_OR_FOLDER", help="your data, instead of the first recipe's")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="one run per seed; default: evaluation.seeds")
    parser.add_argument(
        "--teacher-seeds", type=_seeds, metavar="N,N,...", help="one set of teachers per seed; default: the recipe's set"
    )
    parser.add_argument("--students", metavar="NAME,NAME,...", help="student architectures; default: evaluation.student")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/compare-<first recipe name>")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="folder of squeezed teachers")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    add_compute(parser)
    return _compare


def _seeds(text: str) -> list[int]:
    with suppress(ValueError):
        seeds = [int(part) for part in text.split(",")]
        if 0 <= min(seeds) and max(seeds) < 2**63 and len(set(seeds)) == len(seeds):
            return seeds
    raise argparse.ArgumentTypeError(f"expected distinct whole numbers separated by commas, got {text!r}")


def _compare(args: argparse.Namespace) -> None:
    paths, overrides = split_overrides(args.words)
    if not paths:
        raise RecipeError("expected at least one recipe, got none; give the path of a YAML file")
    recipes = [load_recipe(path) for path in paths]
    if args.data is not None:
        check_source(args.data, "--data")
        quiet()
        overrides = _with_data(recipes[0], args.data, overrides)
    recipes = [override_recipe(recipe, overrides) for recipe in recipes]
    first = recipes[0]
    methods, notes = under_one_protocol([(recipe.name, recipe) for recipe in recipes])
    seeds = args.seeds or first.evaluation.seeds
    sets = args.teacher_seeds or ()
    if sets and not all(method.recipe.squeezed_teachers for method in methods):
        raise RecipeError("--teacher-seeds trains squeeze: teachers, but the recipes name none; leave it out")
    students = [first.evaluation.student] if args.students is None else list(dict.fromkeys(args.students.split(",")))
    if args.dry_run:
        sys.stdout.write(_plan(methods, notes, seeds, students, sets))
        return
    folder = args.output or Path("outputs") / f"compare-{first.name}"
    check_source(first.data.source, "data.source")
    for place, option in ((folder, "--output"), (teachers_folder(args, folder), "--teachers")):
        check_place(place, option)
    quiet()
    from ..compare.runs import compare

    runs = (methods, students, seeds, folder, teachers_folder(args, folder))
    command = " ".join([args.parser.prog, *map(public_word, args.argv)])
    with in_processes(processes(args, first.data.size, folder / "work")):
        table = compare(
            *runs,
            threads=args.threads,
            checkpoint_s=args.checkpoint_every,
            notes=notes,
            command=command,
            teacher_seeds=sets,
        )
    if table is not None:
        sys.stdout.write(f"{table}\npage: {folder / 'comparison.html'}\n")


def _with_data(first: Recipe, source: str, overrides: Sequence[str]) -> list[str]:
    """Return overrides that replace the data of all recipes, and keep the first recipe's settings that still apply."""
    from ..images import count_classes

    words = [f"data.{key}=null" for key in ("config", "revision", "image_column", "label_column")]
    words += ["data.license=unknown", f"data.source={json.dumps(source)}"]
    # The other overrides are applied later, when the number of classes is known.
    data = override_recipe(first, [*words, *(word for word in overrides if word.startswith("data."))]).data
    # Replace the whole section: the other recipes may name splits or columns that this data does not have.
    section = dataclasses.asdict(data) | {"num_classes": count_classes(data)}
    return [f"data={json.dumps(section, ensure_ascii=False)}", *overrides]


def _plan(
    methods: Sequence[Method],
    notes: Sequence[str],
    seeds: Sequence[int],
    students: Sequence[str],
    sets: Sequence[int],
) -> str:
    runs = len(methods) * len(seeds) * max(1, len(sets))
    counts = [count_text(len(methods), "method"), count_text(len(seeds), "seed")]
    counts += [count_text(len(sets), "set") + " of teachers"] if sets else []
    lines = [f"{', '.join(counts)}: {count_text(runs, 'run')}"]
    for method in methods:
        steps = sum(job.iterations for job in plan_jobs(method.recipe))
        lines.append(f"  {method.label}: {count_text(method.recipe.num_images, 'image')}, {count_text(steps, 'step')}")
    lines.append("students: " + ", ".join(f"{name} (soft labels), {name} (hard labels)" for name in students))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


_ABSOLUTE_PATH = re.compile(r"""(?<![\w./~-])/(?!/)[^,\]"']*""")
"""An absolute path, alone or inside an option, an override or a list. URLs do not match."""


def public_word(word: str) -> str:
    """Return a word of the command, quoted for a shell, with absolute paths cut to their last part."""
    return shlex.quote(_ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name, word))
