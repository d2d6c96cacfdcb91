"""Measure student accuracy against the bytes of labels, for each codec and number of stored epochs (docs/labels.md).

    prism-hf distill recipes/digits/prism_ipc10.yaml relabel.epochs=300 --output outputs/labels/digits      # and fashion
    python benchmarks/labels.py outputs/labels/digits outputs/labels/fashion --record benchmarks/results/labels.json

The two folders of a run, `dataset` and `control` (random real images), are each packaged once with float16 labels of 300
epochs. Every row stores a part of the same labels in another way, and trains students for 300 epochs with the recipe's
protocol. Differences are paired over the seeds of the students, with 95 % t-intervals. Finished students are kept in
outputs/labels/scores, so the same command resumes an interrupted one.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import machine
import matplotlib.pyplot as pyplot
import numpy as np
import torch
from scipy.stats import t as student_t

from prism_hf.dataset import load_distilled, view_tables, whole_groups, write_parquet
from prism_hf.dataset.codecs import decode_logits, encode_logits
from prism_hf.dataset.reader import DistilledDataset
from prism_hf.dataset.tables import Table, to_arrays
from prism_hf.evaluation.students import train_student
from prism_hf.images import from_columns, load_source
from prism_hf.models.training import score
from prism_hf.recipe import Recipe, StoredLabels, load_recipe
from prism_hf.recipe.labels import Codec

SCORES = Path("outputs/labels/scores")
EPOCHS, SEEDS = 300, (0, 1, 2, 3, 4)
SETS = {"dataset": "PRISM", "control": "random real"}
TITLES = {"digits-base": "Digits", "fashion-base": "Fashion-MNIST"}


@dataclass(frozen=True)
class Row:
    """One way to store labels, and the loss of the students that use it."""

    codec: Codec
    epochs: int
    hard_epochs: int = 0
    loss: str = "mse_ce"
    top_k: int | None = None

    @property
    def key(self) -> str:
        """Name in files."""
        more = f"-hard{self.hard_epochs}" if self.hard_epochs else ""
        return f"{self.codec}{self.top_k or ''}-{self.epochs}{more}-{self.loss}"


ROWS = (
    Row("float16", 300),
    Row("int8", 300),
    Row("int4", 300),
    Row("float16", 80),
    Row("int4", 30),
    Row("int4", 20),
    Row("float16", 15),
    Row("float16", 7),
    Row("int4", 7),
    Row("int4", 7, hard_epochs=100),
    Row("int4", 7, hard_epochs=200),
    Row("float16", 3),
    Row("float16", 300, loss="kl"),
    Row("topk", 300, loss="kl", top_k=3),
)
"""The first row of each loss is the one that the others are compared with."""


def stored_bytes(run: Path, name: str, row: Row) -> int:
    """Return the size of the file of views of a dataset whose labels are stored as in a row."""
    table, classes = Table(run / name, "views"), len(load_distilled(run / name).class_names)
    count = table.num_rows // EPOCHS
    columns = to_arrays(table.read(0, row.epochs * count, tuple(table.features)))
    labels = StoredLabels(row.codec, row.epochs, row.top_k, load_recipe(run / "recipe.yaml").evaluation.temperature)
    parts = [{name: part[e * count : (e + 1) * count] for name, part in columns.items()} for e in range(row.epochs)]
    with tempfile.TemporaryDirectory() as draft:
        path = Path(draft) / "views.parquet"
        write_parquet(path, whole_groups(table for part in parts for table in view_tables([part], labels, classes)))
        return path.stat().st_size


def stored(folder: Path, row: Row, recipe: Recipe) -> DistilledDataset:
    """Return a packaged dataset with its labels stored as in a row."""
    base, table = load_distilled(folder), Table(folder, "views")
    count, classes = len(base.labels), len(base.class_names)
    columns = to_arrays(table.read(0, row.epochs * count, tuple(table.features)))
    labels = StoredLabels(row.codec, row.epochs, row.top_k, recipe.evaluation.temperature)
    logits = torch.from_numpy(decode_logits(encode_logits(columns["teacher_logits"], labels), classes).copy())
    rows = from_columns(columns)

    def views(epoch: int, part: range) -> tuple:
        where = slice(epoch * count + part.start, epoch * count + part.stop)
        return rows[where], logits[where]

    relabel = replace(recipe.relabel, stored_epochs=row.epochs)
    return replace(base, views=views, num_epochs=row.epochs, recipe=replace(recipe, relabel=relabel))


def work(task: tuple[Path, str, Row, int]) -> float:
    """Train and score one student; return its top-1 accuracy."""
    run, name, row, seed = task
    file = SCORES / f"{run.name}-{name}-{row.key}-{seed}.json"
    if not file.is_file():
        torch.set_num_threads(1)
        recipe = load_recipe(run / "recipe.yaml")
        source = stored(run / name, row, recipe)
        settings = replace(recipe.evaluation, epochs=EPOCHS, hard_epochs=row.hard_epochs, loss=row.loss)
        network = train_student(source, settings, labels="soft", seed=seed, device=torch.device("cpu"))
        top1 = score(network, load_source(recipe.data).test, device=torch.device("cpu"))
        file.write_text(json.dumps({"top1": top1}), encoding="utf-8")
        sys.stderr.write(f"{file.stem}: {top1:.4f}\n")
    return float(json.loads(file.read_text(encoding="utf-8"))["top1"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def large_bytes(runs: Path) -> dict[str, float]:
    """Return the bytes of a view with 1000 classes for each codec: real labels of two networks, 2,000 views."""
    table = Table(runs, "views")
    columns = to_arrays(table.read(0, table.num_rows, tuple(table.features)))
    classes, found = columns["teacher_logits"].shape[1], {}
    for codec, top_k in (("float16", None), ("int8", None), ("int4", None), ("topk", 50), ("seed", None)):
        labels = StoredLabels(codec, 1, top_k, 20.0)
        with tempfile.TemporaryDirectory() as draft:
            path = Path(draft) / "views.parquet"
            write_parquet(path, whole_groups(view_tables([columns], labels, classes)))
            found[codec + (f" {top_k}" if top_k else "")] = path.stat().st_size / table.num_rows
    return found


def draw(results: Sequence[dict], path: Path) -> None:
    """Draw accuracy against the bytes of views, one panel for each dataset."""
    names = list(dict.fromkeys(row["data"] for row in results))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3.6), layout="constrained")
    for panel, name in zip(np.atleast_1d(panels), names, strict=True):
        for label, marker in (("PRISM", "o"), ("random real", "s")):
            for codec in ("float16", "int8", "int4"):
                chosen = [row for row in results if (row["data"], row["codec"], row["loss"]) == (name, codec, "mse_ce")]
                points = [row["sets"][label] for row in chosen if not row["hard_epochs"]]
                means = [interval([100 * value for value in point["top1"]]) for point in points]
                panel.errorbar(
                    [point["bytes"] / 1000 for point in points],
                    [mean for mean, _ in means],
                    [half for _, half in means],
                    fmt=marker,
                    color={"float16": "#333333", "int8": "#1f77b4", "int4": "#d62728"}[codec],
                    fillstyle="full" if label == "PRISM" else "none",
                    capsize=2,
                    label=f"{label}, {codec}",
                )
        panel.set(xscale="log", xlabel="views and labels, kB", ylabel="student top-1, %", title=TITLES.get(name, name))
    np.atleast_1d(panels)[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Train all students of all runs, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--large", type=Path, help="dataset with float16 labels of 1000 classes, for the bytes of a view")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--draw", type=Path, help="a PNG file")
    args = parser.parse_args()
    SCORES.mkdir(parents=True, exist_ok=True)
    tasks = [(run, name, row, seed) for seed in SEEDS for run in args.runs for row in ROWS for name in SETS]
    with ProcessPoolExecutor(args.processes) as pool:
        found = dict(zip(tasks, pool.map(work, tasks), strict=True))
    results = []
    for run in args.runs:
        for row in ROWS:
            first = next(each for each in ROWS if each.loss == row.loss)
            entry: dict = {"data": run.name, **row.__dict__, "sets": {}}
            for name, label in SETS.items():
                scores = [found[run, name, row, seed] for seed in SEEDS]
                gaps = [a - found[run, name, first, seed] for a, seed in zip(scores, SEEDS, strict=True)]
                size, whole = stored_bytes(run, name, row), stored_bytes(run, name, first)
                gap = interval(gaps) if row is not first else None
                entry["sets"][label] = {"top1": scores, "gap": gap, "bytes": size, "smaller": whole / size}
            results.append(entry)
    if args.draw:
        draw(results, args.draw)
    if args.record:
        command = "python benchmarks/labels.py outputs/labels/digits outputs/labels/fashion --record ..."
        facts = {"command": command} | machine.facts() | {"seeds": SEEDS, "epochs": EPOCHS, "rows": results}
        facts["large"] = large_bytes(args.large) if args.large else None
        args.record.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
