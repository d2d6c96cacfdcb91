"""Run the comparisons behind the tables of docs/comparison.md: `accelerate launch benchmarks/tables.py [NAME ...]`.

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        benchmarks/tables.py --data outputs/fashion-mnist --threads 1              # all tables, overnight on 2 cores
    accelerate launch benchmarks/tables.py methods-ipc10 --data outputs/fashion-mnist

With --reduced, three tables are made with fewer seeds; this takes two processes half an hour. Without --data, the images
come from the Hub. Finished work is kept in outputs/tables, so the same command resumes an interrupted one. Each finished
table is written to benchmarks/results/fashion-NAME.json.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import machine

from prism_hf.cli.options import add_compute, part, quiet, run_command
from prism_hf.compare.comparison import StudentSetup
from prism_hf.compare.methods import random_recipe
from prism_hf.errors import RecipeError
from prism_hf.evaluation.students import Labels
from prism_hf.recipe.schema import Recipe
from prism_hf.recipe.yaml_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2, 3, 4)
PRISM = "prism_ipc10"
METHODS = {
    "random real": "random_ipc10",
    "SRe2L": "sre2l_ipc10",
    "G-VBSM": "gvbsm_ipc10",
    "G-VBSM, BN only": "gvbsm_bn_ipc10",
    "PRISM per slot": PRISM,
    "PRISM per iteration": "prism_per_iteration_ipc10",
}
SIZES: dict[int, tuple[str, ...]] = {
    1: (
        "synthesis.ipc=1", "relabel.epochs=300", "relabel.batch_size=10", "evaluation.batch_size=10",
    ),
    10: (),
    50: (
        "synthesis.ipc=50", "relabel.epochs=16", "relabel.batch_size=50", "evaluation.batch_size=50",
    ),
}  # fmt: skip
"""Overrides for each number of images per class; they keep the total number of views about constant."""
STUDENTS = ("test_resnet", "test_efficientnet", "cs3darknet_s")
"""The architectures of the logit teacher, of a BN teacher, and one that is not a teacher's."""

RANDOM = "random:"
"""In front of the name of a recipe: random real images, labeled as in this recipe."""
Row = tuple[str, str, tuple[str, ...]]  # label, recipe, overrides


@dataclass(frozen=True)
class Table:
    """The settings of one comparison.

    Attributes:
        rows: Label, recipe and overrides of each method.
        seeds: Seeds of the runs of each method.
        common: Overrides for every row.
        students: Architectures; the first learns from soft and hard labels, the others from soft labels.
        budgets: More label budgets for the first student: kind of labels, and epochs of views.
        own: Sections that each recipe keeps instead of taking them from the protocol.
        ceiling: Whether the first student is also trained on all real images.
        teacher_seeds: Seeds of the sets of teachers; every seed is run with every set.
        images: The folder of the recipes: `fashion` or `openclipart`.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = SEEDS
    common: tuple[str, ...] = ()
    students: tuple[str, ...] = STUDENTS[:1]
    budgets: tuple[tuple[Labels, int | None], ...] = ()
    own: tuple[str, ...] = ()
    ceiling: bool = False
    teacher_seeds: tuple[int, ...] = ()
    images: str = "fashion"


def methods_at(ipc: int) -> tuple[Row, ...]:
    """Return every method at one ipc; PRISM comes first, because the first recipe defines the protocol."""
    rows = [(label, name, SIZES[ipc] + _batches(name, ipc)) for label, name in METHODS.items()]
    first = next(row for row in rows if row[1] == PRISM)
    return (first, *(row for row in rows if row is not first), *best_at(ipc))


def best_at(ipc: int) -> tuple[Row, ...]:
    """Return `PRISM from k-means` at one ipc, and its start images as a method."""
    best = f"prism_kmeans_ipc{ipc}"
    rows = (("PRISM from k-means", best, ()), ("its start images, not optimized", best, ("synthesis.iterations=0",)))
    previous = ("PRISM from k-means of the easiest 0.8", best, ("synthesis.easiest=0.8",))  # the former default
    return (*rows, previous) if ipc == 10 else rows


def _batches(name: str, ipc: int) -> tuple[str, ...]:
    """Return the overrides of the batch size: ten images at one image per class, else as in the recipe."""
    if ipc > 1 or name == "random_ipc10":
        return ()
    if name.startswith("gvbsm"):
        return ("synthesis.batch_size=10",)
    return ("synthesis.slots_per_batch=1", "synthesis.batch_size=10")


def switch(label: str, *overrides: str) -> Row:
    """Return a row that changes one thing in PRISM."""
    return (label, PRISM, overrides)


BN_TEACHERS = (
    switch("a drawn subset (PRISM)"),
    switch("none", "teachers.bn_pool=[]", "synthesis.bn_weight=0"),
    switch("the logit teacher", "teachers.bn_pool=[]"),
    switch(
        "one other",
        "teachers.include_logit=false",
        "teachers.bn_pool=[squeeze:test_byobnet]",
        "teachers.draw_probability=1",
    ),
    switch("all four", "teachers.draw_probability=1"),
)


def convergence(recipe: str, epochs: tuple[int, ...], *more: str, views: int) -> tuple[Row, ...]:
    """Return PRISM and random real images for several lengths of training, and the longest with more and fewer views."""
    lengths = [(count, min(views, count)) for count in epochs]
    return tuple(
        (f"{label}, {count} epochs, {stored} of views", name, (*more, *length(count, stored)))
        for count, stored in [*lengths, (epochs[-1], views // 2), (epochs[-1], 2 * views)]
        for label, name in (("PRISM", recipe), ("random real", RANDOM + recipe))
    )


def length(epochs: int, stored: int) -> tuple[str, ...]:
    """Return the overrides for a number of epochs of students, and of epochs of views that they use again and again."""
    return (f"relabel.epochs={epochs}", f"relabel.stored_epochs={stored}")


HELD_OUT = {"seeds": (0,), "teacher_seeds": (0, 1)}
"""Sets of teachers for choices, which are made on held-out training images."""
FIFTH = (f"data.validation_fraction={1 / 6}", "teachers.verifier=null")
QUARTER = ("data.validation_fraction=0.25",)


def final_rows(prism: str, easy: str, sre2l: Row, pool: str, without_bn: str) -> tuple[Row, ...]:
    """Return PRISM, PRISM from easy images, SRe2L, and PRISM with a teacher without batch norm in its pool."""
    return (
        ("PRISM per slot", prism, ()),
        ("PRISM from easy images", easy, ()),
        ("its start images, not optimized", easy, ("synthesis.iterations=0",)),
        sre2l,
        ("PRISM with a LayerNorm teacher", prism, (f"teachers.bn_pool=[{pool}, {without_bn}]",)),
    )


CHOSEN = {ipc: (methods_at(ipc)[0], *best_at(ipc)) for ipc in (1, 10)}
EASIEST = (1.0, 0.8, 0.5, 0.35)
NOISE = (
    "synthesis.init=noise", "synthesis.lr=0.25", "synthesis.bn_weight=0.3", "synthesis.bn_reduction=mean",
    "synthesis.first_bn_multiplier=1",
)  # fmt: skip
TABLES = {
    "methods-ipc10": Table(methods_at(10), students=STUDENTS, ceiling=True),
    "methods-ipc1": Table(methods_at(1)),
    "methods-ipc50": Table(methods_at(50)),
    "decoupling": Table(BN_TEACHERS),
    "decoupling-noise": Table(
        tuple((label, name, (*NOISE, *more)) for label, name, more in BN_TEACHERS),
        seeds=SEEDS[:3],
    ),
    "iterations": Table(
        tuple(
            (f"{label}, {steps} iterations", name, (*overrides, f"synthesis.iterations={steps}"))
            for steps in (100, 400)
            for label, name, overrides in (
                ("PRISM", PRISM, ()),
                ("PRISM from noise", PRISM, NOISE),
                ("SRe2L", "sre2l_ipc10", ()),
            )
        ),
        seeds=SEEDS[:3],
    ),
    "switches": Table(
        (
            switch("PRISM"),
            switch("init: noise", "synthesis.init=noise"),
            switch("init: median difficulty", "synthesis.init=real_median"),
            switch("init: k-means", "synthesis.init=real_kmeans"),
            switch("init: mosaic", "synthesis.init=mosaic", "synthesis.mosaic={crop_scale: [0.3, 1.0]}"),
            switch(
                "ladder", "synthesis.slots_per_batch=1", "synthesis.batch_size=10", "synthesis.ladder={step: 12, period: 8}"
            ),
            switch("one slot per batch, no ladder", "synthesis.slots_per_batch=1", "synthesis.batch_size=10"),
            switch("BN reduction: mean", "synthesis.bn_reduction=mean"),
            switch("BN reduction: balanced, weight 1", "synthesis.bn_reduction=balanced", "synthesis.bn_weight=1"),
            switch("within-class batches", "synthesis.batch_order=within_class", "synthesis.slots_per_batch=1"),
            switch("first BN layer x 1", "synthesis.first_bn_multiplier=1"),
            switch("crop curriculum", "synthesis.view.curriculum=cosine"),
            switch("labels: plain mean", "relabel.ensemble=mean"),
        ),
        seeds=SEEDS[:3],
        own=("relabel",),
    ),
    "held-out": Table(
        (
            switch("PRISM"),
            *(
                (f"PRISM from k-means, easiest {share}", "prism_kmeans_ipc10", (f"synthesis.easiest={share}",))
                for share in EASIEST
            ),
            ("PRISM from k-means, not optimized", "prism_kmeans_ipc10", ("synthesis.iterations=0",)),
            ("PRISM from k-means, lr .02", "prism_kmeans_ipc10", ("synthesis.lr=0.02",)),
        ),
        seeds=SEEDS[:3],
        common=(f"data.validation_fraction={1 / 6}",),
    ),
    "fresh-seeds": Table(CHOSEN[10], seeds=tuple(range(5, 15))),  # seeds that were not used to choose settings
    "other-teachers": Table(CHOSEN[10], seeds=SEEDS[:3], common=("squeeze.seed=1",)),
    "other-teachers-ipc1": Table(CHOSEN[1], seeds=SEEDS[:3], common=("squeeze.seed=1",)),
    "convergence-ipc1": Table(
        convergence(PRISM, (300, 600, 1200, 2400, 4800), *SIZES[1], *_batches(PRISM, 1), views=300),
        common=FIFTH,
        own=("relabel",),
        **HELD_OUT,
    ),
    "convergence-ipc10": Table(
        convergence(PRISM, (80, 160, 320, 640, 1280), views=80), common=FIFTH, own=("relabel",), **HELD_OUT
    ),
    "convergence-ipc50": Table(
        convergence(PRISM, (16, 32, 64, 128, 256), *SIZES[50], views=32),
        common=FIFTH,
        own=("relabel",),
        **HELD_OUT,
    ),
    "convergence-64-ipc10": Table(
        convergence("prism_64_ipc10", (80, 160, 320, 640, 1280), views=80),
        common=QUARTER,
        images="openclipart",
        own=("relabel",),
        **HELD_OUT,
    ),
    "tune-ipc10": Table(
        (
            switch("PRISM"),
            switch("easy .5, 0", "synthesis.easiest=0.5", "synthesis.iterations=0"),
            switch("easy .25, 0", "synthesis.easiest=0.25", "synthesis.iterations=0"),
            switch("easy .5, 100", "synthesis.easiest=0.5"),
            switch("kmeans .5, 0", "synthesis.init=real_kmeans", "synthesis.easiest=0.5", "synthesis.iterations=0"),
            ("kmeans .5, 100", "prism_kmeans_ipc10", ()),
        ),
        common=(*FIFTH, *length(160, 80)),
        **HELD_OUT,
    ),
    "tune-64-ipc10": Table(
        (
            ("PRISM", "prism_64_ipc10", ()),
            ("easy .5, 0", "prism_64_ipc10", ("synthesis.easiest=0.5", "synthesis.iterations=0")),
            ("easy .25, 0", "prism_64_ipc10", ("synthesis.easiest=0.25", "synthesis.iterations=0")),
            (
                "kmeans .5, 0",
                "prism_64_ipc10",
                ("synthesis.init=real_kmeans", "synthesis.easiest=0.5", "synthesis.iterations=0"),
            ),
            ("easy .5, 100", "prism_64_ipc10", ("synthesis.easiest=0.5",)),
            ("kmeans .5, others 100", "prism_kmeans_64_ipc10", ()),
        ),
        common=(*QUARTER, *length(160, 80)),
        images="openclipart",
        **HELD_OUT,
    ),
    "final-ipc10": Table(
        final_rows(
            PRISM,
            "prism_easy_ipc10",
            ("SRe2L from real images", PRISM, ("teachers.bn_pool=[]",)),
            "squeeze:test_byobnet, squeeze:test_efficientnet, squeeze:regnetx_002",
            "squeeze:test_efficientnet_ln",
        ),
        common=(*length(320, 80), "teachers.verifier=null"),
        seeds=(0, 1),
        teacher_seeds=(2, 3, 4),
    ),
    "final-64-ipc10": Table(
        final_rows(
            "prism_64_ipc10",
            "prism_kmeans_64_ipc10",
            ("SRe2L from real images", "prism_64_ipc10", ("teachers.bn_pool=[]",)),
            "squeeze:test_byobnet, squeeze:test_efficientnet",
            "squeeze:test_convnext2",
        ),
        common=length(160, 80),
        images="openclipart",
        seeds=(0,),
        teacher_seeds=(2, 3, 4),
    ),
    "labels": Table(
        (switch("PRISM per slot"), ("random real", "random_ipc10", ())),
        seeds=SEEDS[:3],
        common=("relabel.epochs=300", "evaluation.epochs=300"),
        budgets=(("image", None), ("soft", 10), ("soft", 50)),
    ),
}


def recipe_of(row: Row, table: Table, data: str | None) -> Recipe:
    """Load the recipe of a row with all its overrides."""
    _, name, overrides = row
    source = () if data is None or table.images != "fashion" else (f"data.source={data}",)
    file = ROOT / "recipes" / table.images / f"{name.removeprefix(RANDOM)}.yaml"
    recipe = load_recipe(file, [*source, *table.common, *overrides])
    return random_recipe(recipe, recipe.synthesis.ipc) if name.startswith(RANDOM) else recipe


def reduced(table: Table) -> Table:
    """Return the half-hour version of a table: two seeds, one student."""
    return replace(table, seeds=(0, 1), students=table.students[:1], ceiling=False)


REDUCED = ("methods-ipc1", "methods-ipc10", "decoupling")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--data", metavar="FOLDER", help="output of recipes/fashion/to_parquet.py; default: the Hub")
    parser.add_argument("--reduced", action="store_true", help=f"two seeds and one student, only for {', '.join(REDUCED)}")
    parser.add_argument("--as-is", action="store_true", help="run nothing: write each table from its finished runs")
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="make only part I of N of the runs, and no table; N can run at once",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="use only the first N seeds")
    add_compute(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Make the requested tables one after another."""
    unknown = [name for name in args.names if name not in TABLES]
    if unknown:
        raise RecipeError(f"unknown table {unknown[0]!r}; use one of {', '.join(TABLES)}")
    if args.part is not None and not 1 <= args.part[0] <= args.part[1]:
        raise RecipeError(f"part {args.part[0]}/{args.part[1]} does not exist; expected 1/N to N/N")
    quiet()
    from prism_hf.run.context import make_accelerator

    accelerator = make_accelerator()
    for name in args.names or (REDUCED if args.reduced else TABLES):
        table = TABLES[name]
        make(name, reduced(table) if args.reduced else table, args, accelerator)
    accelerator.end_training()


def make(name: str, table: Table, args: argparse.Namespace, accelerator: object) -> None:
    """Make one table and write its JSON."""
    from prism_hf.compare import under_one_protocol
    from prism_hf.compare.comparison import Comparison
    from prism_hf.compare.findings import findings
    from prism_hf.compare.page import write_page
    from prism_hf.compare.runs import check_comparison
    from prism_hf.compare.runs import make as make_runs
    from prism_hf.run.threads import use_threads
    from prism_hf.runtime.lock import locked
    from prism_hf.runtime.store import write_json

    recipes = [(row[0], recipe_of(row, table, args.data)) for row in table.rows]
    methods, notes = under_one_protocol(recipes, own=table.own)
    seeds = table.seeds[: args.seeds]
    folder = ROOT / "outputs" / "tables" / (f"{name}-reduced" if args.reduced else name)
    made = Comparison(
        methods,
        setups_of(table),
        seeds,
        folder=folder,
        teachers_root=ROOT / "outputs" / "teachers",
        accelerator=accelerator,
        checkpoint_s=args.checkpoint_every,
        ceilings=table.students[:1] if table.ceiling else (),
        teacher_seeds=table.teacher_seeds,
    )
    check_comparison(made)
    threads = use_threads(accelerator, folder / "work", args.threads)
    if args.part is not None:
        make_runs(made, args.part)
    elif accelerator.is_main_process:
        with locked(folder):
            accelerator.wait_for_everyone()
            failed = {} if args.as_is else make_runs(made)
            reduced = " --reduced" if args.reduced else ""
            command = f"accelerate launch benchmarks/tables.py {name}{reduced} --threads {threads}"
            facts, images = findings(made, failed, notes=notes, command=command)
            write_page(folder, facts, images)
            result = {**small(facts), "hardware": machine.hardware() | facts["hardware"]}
            write_json(ROOT / "benchmarks" / "results" / f"{table.images}-{folder.name}.json", result)
    else:
        accelerator.wait_for_everyone()
        if not args.as_is:
            make_runs(made)


def setups_of(table: Table) -> list[StudentSetup]:
    """Return the student setups: the first student with soft and hard labels, the others with soft, then the budgets."""
    first, *others = table.students
    budgets = [StudentSetup(first, labels, epochs) for labels, epochs in table.budgets]
    soft = [StudentSetup(name, "soft") for name in others]
    return [StudentSetup(first, "soft"), StudentSetup(first, "hard"), *soft, *budgets]


def small(facts: dict[str, object]) -> dict[str, object]:
    """Return the findings without the data that only the figures need."""
    methods = [
        {key: value for key, value in method.items() if key not in ("histogram", "points")} for method in facts["methods"]
    ]
    real = {"similarity": facts["real"]["similarity"]}
    return {**{key: value for key, value in facts.items() if key != "map"}, "methods": methods, "real": real}


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
