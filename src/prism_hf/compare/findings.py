"""Findings of a comparison as plain values, for comparison.json, the page, and the tables in the docs."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ..dataset import load_distilled, versions
from ..evaluation import (
    NOT_ALL,
    FeatureMap,
    dd_ranking,
    difference,
    features_of,
    intra_class_similarity,
    pair_histogram,
    read_scores,
    remarks_on,
    score_row,
)
from ..recipe import dump_recipe, public_recipe, to_dict
from ..runtime import is_finished
from .comparison import Comparison, name_of
from .methods import Method

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of the finished runs of each method, by its label; each record includes its seed."""

_SAMPLE = 100
"""Real images per class for the feature map and the histograms."""


def findings(
    comparison: Comparison, failed: Mapping[str, str], *, notes: Sequence[str], command: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Collect the findings of a comparison, finished or not; `failed` is from `make`, `notes` from `under_one_protocol`.

    Returns:
        The contents of comparison.json; and the images of the first finished run of each method, by its label,
        (K * ipc, C, H, W) uint8 sorted by class.
    """
    records, data = _records(comparison), comparison.common_run().data
    sample = torch.cat([torch.from_numpy(rows[:_SAMPLE]) for rows in data.train.rows_by_class(data.num_classes)])
    features, labels = map(torch.cat, zip(*features_of(comparison.network, data.train, sample), strict=True))
    similarity, plane = intra_class_similarity(features, labels, data.num_classes), FeatureMap(features)
    methods, images = [], {}
    for method in comparison.methods:
        if runs := records[method.label]:
            distilled = load_distilled(comparison.run_of(method, runs[0]["seed"], runs[0]["teacher_seed"]).dataset)
            images[method.label] = distilled.images_uint8
            run_features, run_labels = map(torch.cat, zip(*features_of(comparison.network, distilled), strict=True))
            methods.append(_facts(method, runs) | _plot_data(run_features, run_labels, plane))
    full_data = [
        {"student": student, **score}
        for student in comparison.ceilings
        for score in read_scores([task for task in comparison.full_tasks(student) if is_finished(task.score.path)])
    ]
    scores = _scores(comparison, records)
    add_dd_ranking(methods, scores, full_data)
    real = {"mean": similarity.mean, "per_class": list(similarity.per_class), "images_per_class": _SAMPLE}
    how = "first two principal components of the features of real training images"
    return {
        "name": comparison.folder.absolute().name,
        "data": _data(comparison),
        "protocol": _protocol(comparison) | {"notes": [*notes, *_remarks(comparison, scores, full_data)]},
        "methods": methods,
        "scores": scores,
        "full_data": full_data,
        "real": {"similarity": real, **_plot_data(features, labels, plane)},
        "map": {"network": comparison.network.name, "how": how},
        "differences": _differences(scores, comparison.methods),
        "left_out": _left_out(comparison, failed, records, full_data),
        "wall_time_s": sum(record["wall_time_s"] for runs in records.values() for record in runs),
        "hardware": comparison.common_run().hardware | {"processes": comparison.accelerator.num_processes},
        "versions": versions(),
        "command": command,
    }, images


def _remarks(
    comparison: Comparison, scores: Sequence[Mapping[str, Any]], full_data: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return sentences on what means little: weak teachers, a weak verifier, under-trained students on all real images."""
    data, verifier = comparison.common_run().data, comparison.protocol.teachers.verifier
    top1 = {name: score for run in comparison.one_of_each for name, score in run.known_top1.items()}
    remarks = remarks_on(top1, verifier, (), classes=data.num_classes, count=len(data.test))
    for student in comparison.ceilings:
        full = [{**row, "images": "full"} for row in full_data if row["student"] == student]
        others = [{**row, "images": "distilled"} for row in scores if row["student"] == student]
        found = remarks_on({}, None, [*full, *others], classes=data.num_classes, count=len(data.test))
        remarks += [f"{student}: {text}" for text in found]
    return remarks


def _records(comparison: Comparison) -> Records:
    records = {}
    for method in comparison.methods:
        runs = [(draw, comparison.run_of(method, *draw)) for draw in comparison.draws]
        records[method.label] = [
            {"seed": seed, "teacher_seed": teachers, **comparison.record(run).read_json()}
            for (seed, teachers), run in runs
            if comparison.is_made(run)
        ]
    return records


def _data(comparison: Comparison) -> dict[str, Any]:
    recipe, data = comparison.protocol, comparison.common_run().data
    source = public_recipe(recipe).data.source
    return {
        "source": source if data.on_hub else PurePath(source).name or source,
        "config": recipe.data.config,
        "revision": data.revision or recipe.data.revision,
        "classes": list(data.class_names),
        "train_count": len(data.train),
        "test_count": len(data.test),
        "tested_on": recipe.data.tested_on,
        "license": recipe.data.license,
    }


def _protocol(comparison: Comparison) -> dict[str, Any]:
    """Return the settings shared by all runs, with the requested students and seeds instead of those in the recipe."""
    recipe, students = public_recipe(comparison.protocol), comparison.students
    requested = {"student": students[0] if len(students) == 1 else students, "seeds": list(comparison.seeds)}
    names = dict.fromkeys(name for method in comparison.methods for name in method.recipe.all_teachers)
    sets = []
    for teachers in comparison.teacher_seeds or (None,):
        runs = [comparison.run_of(method, comparison.seeds[0], teachers) for method in comparison.methods]
        sets.append({name: top1 for run in runs for name, top1 in run.squeezed_top1.items()})
    return {
        "teachers": {name: _mean(top1.get(name) for top1 in sets) for name in names},
        "teacher_seeds": list(comparison.teacher_seeds),
        "relabel": to_dict(recipe)["relabel"],
        "evaluation": dataclasses.asdict(recipe.evaluation) | requested,
        "squeeze": to_dict(recipe)["squeeze"],
        "verifier": recipe.teachers.verifier,
        "seeds": list(comparison.seeds),
    }


def _left_out(
    comparison: Comparison, failed: Mapping[str, str], records: Records, full_data: Sequence[object]
) -> dict[str, str]:
    """Return the reason for each row that is missing from the table."""
    left_out = dict(failed)
    for method in comparison.methods:
        tried = any(name_of(comparison.run_of(method, *draw)) in failed for draw in comparison.draws)
        if not records[method.label] and not tried:
            left_out[f"{method.label}, ipc {method.recipe.synthesis.ipc}"] = "not yet run"
    if not comparison.protocol.data.has_all_images:
        left_out["all real"] = NOT_ALL
    elif not comparison.protocol.evaluation.full_data_epochs:
        left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
    elif not full_data:
        left_out["all real"] = "not yet run" if comparison.ceilings else "not requested"
    return left_out


def _facts(method: Method, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts about a method other than its scores, aggregated over the seeds."""
    means = [record["similarity"]["mean"] for record in records]
    averaged = ("image_bytes", "label_bytes", "verifier_top1", "logit_top1")
    return {
        "label": method.label,
        "recipe": method.recipe.name,
        "ipc": method.recipe.synthesis.ipc,
        "control": method.control,
        "recipe_yaml": dump_recipe(public_recipe(method.recipe)),
        # Use the median: the first run of a method may also have computed data that later runs read from disk.
        "seconds_per_image": statistics.median(float(record["seconds_per_image"]) for record in records),
        "image_steps": records[0]["image_steps"],
        **{key: _mean(record[key] for record in records) for key in averaged},
        "similarity": {
            "mean": _mean(means),
            "std_over_seeds": None if None in means or len(means) < 2 else statistics.stdev(means),
            "per_class": records[0]["similarity"]["per_class"],
        },
        "seeds": [record["seed"] for record in records],
        "grid": "assets/grids.png",
    }


def _scores(comparison: Comparison, records: Records) -> list[dict[str, Any]]:
    """Return the rows of the table, one per method, student and kind of labels."""
    rows = []
    for method in comparison.methods:
        runs = records[method.label]
        seeds = [record["seed"] for record in runs]
        sets = [record["teacher_seed"] for record in runs] if comparison.teacher_seeds else []
        for scores in zip(*(record["scores"] for record in runs), strict=True):  # one per seed
            top1 = [float(score["top1"]) for score in scores]
            score = score_row(method.label, scores[0]["labels"], seeds, top1, int(runs[0]["images"]), sets)
            first = {
                "method": score.pop("images"),
                "ipc": method.recipe.synthesis.ipc,
                "student": scores[0]["student"],
                "label_bytes": _mean(score["label_bytes"] for score in scores),
            }
            rows.append(first | score)
    return rows


def add_dd_ranking(
    methods: Sequence[dict[str, Any]], scores: Sequence[Mapping[str, Any]], full_data: Sequence[Mapping[str, Any]]
) -> None:
    """Add `dd_ranking` to the facts of each method: its scores for the first student against the control at its ipc."""
    student = scores[0]["student"] if scores else None
    mean = {(row["method"], row["labels"]): row["mean"] for row in scores if row["student"] == student}
    full = next((row["mean"] for row in full_data if row["student"] == student), None)
    for method in methods:
        control = next((other["label"] for other in methods if other["control"] and other["ipc"] == method["ipc"]), None)
        label = method["label"]
        method["dd_ranking"] = dd_ranking(
            full_hard=full,
            hard=mean.get((label, "hard")),
            soft=mean.get((label, "soft")),
            random_soft=mean.get((control, "soft")),
        )._asdict()


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or `None` if any value is `None`."""
    listed = list(values)
    return None if None in listed else statistics.fmean(listed)  # type: ignore[arg-type]


def _differences(scores: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Compare each method with the controls at the same ipc, and with the first method that is not a control."""
    controls = {method.label for method in methods if method.control}
    first = next((method.label for method in methods if not method.control), None)
    rows = []
    for a, b in itertools.product(scores, scores):
        shared = {key: a[key] for key in ("ipc", "student", "labels")}
        wanted = b["method"] in controls or b["method"] == first
        if wanted and shared.items() <= b.items() and a["method"] not in (b["method"], *controls):
            gap, half = difference(a, b)
            finite = half if math.isfinite(half) else None
            rows.append({"a": a["method"], "b": b["method"], **shared, "difference": gap, "half_width": finite})
    return rows


def _plot_data(features: Tensor, labels: Tensor, plane: FeatureMap) -> dict[str, Any]:
    """Return the data for the figures, from features (N, D) and labels (N,)."""
    return {
        "histogram": pair_histogram(features, labels),
        "points": {"xy": plane.project(features), "label": labels.tolist()},
    }
