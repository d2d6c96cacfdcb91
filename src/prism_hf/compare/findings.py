"""What a comparison found, as plain values: for comparison.json, the page, and the tables of the docs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dataset.provenance import versions
from ..dataset.reader import DistilledDataset, load_distilled
from ..evaluation.diversity import intra_class_similarity
from ..evaluation.feature_map import FeatureMap, pair_histogram
from ..evaluation.report import Score, difference
from ..models.features import penultimate_features
from ..models.teacher import Teacher
from ..recipe.schema import Recipe, to_dict
from ..recipe.yaml_file import dump_recipe, public_recipe
from ..run.scores import read_score, task_file
from ..run.stages import Stages
from ..runtime.store import read_record, write_bytes, write_json
from .figures import draw_comparison
from .methods import Cell, Method
from .page import render_html, render_markdown
from .runs import FULL, Comparison

_SAMPLE = 100
"""Real images per class behind the feature map and the histograms."""


class Findings:
    """What is there of a comparison, finished or not.

    Args:
        comparison: Its runs.
    """

    def __init__(self, comparison: Comparison) -> None:
        self._made, self._device = comparison, comparison.accelerator.device
        self._records = {method.slug: self._found(method) for method in comparison.methods}

    def _found(self, method: Method) -> list[tuple[int, dict[str, Any]]]:
        """(seed, record) of the runs of a method that are there."""
        cells = [cell for cell in self._made.cells if cell.method is method and self._made.is_found(cell)]
        return [(cell.seed, dict(read_record(self._made.record_file(cell)))) for cell in cells]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as comparison.json has it."""
        recipe, data = self._made.cells[0].recipe, self._made.shared.data
        network, full_data = self._made.network(), self._full_scores()
        real = _Sample(self._made.shared, network, self._device)
        features = FeatureMap(real.features)
        methods = []
        scores: list[dict[str, Any]] = []
        for method in self._made.methods:
            records = self._records[method.slug]
            if not records:
                continue
            scores += self._scores_of(method, records)
            methods.append(self._facts_of(method, records, features, network))
        public = public_recipe(recipe)
        return {
            "name": self._made.folder.absolute().name,
            "data": {
                "source": public.data.source,
                "classes": list(data.class_names),
                "train_count": len(data.train),
                "test_count": len(data.test),
                "tested_on": recipe.data.tested_on,
                "licence": recipe.data.licence,
            },
            "protocol": {
                "teachers": self._teachers_top1(),
                "relabel": to_dict(public)["relabel"],
                "evaluation": self._evaluation(public),
                "squeeze": to_dict(public)["squeeze"],
                "verifier": public.teachers.verifier,
                "seeds": list(self._made.seeds),
            },
            "methods": methods,
            "scores": scores,
            "full_data": full_data,
            "real": {
                "similarity": real.similarity(),
                "histogram": pair_histogram(real.features, real.labels),
                "points": {"xy": features.project(real.features), "label": real.labels.tolist()},
            },
            "map": {
                "network": network.name,
                "how": "first two principal components of the features of real training images",
            },
            "differences": _differences(scores, self._made.methods),
            "left_out": self._left_out(full_data),
            "wall_time_s": sum(record["wall_time_s"] for records in self._records.values() for _, record in records),
            "hardware": self._made.shared.run.hardware | {"processes": self._made.accelerator.num_processes},
            "versions": versions(),
        }

    def _evaluation(self, recipe: Recipe) -> dict[str, object]:
        """The student protocol, with the students and seeds that were asked for in place of the recipe's."""
        students = self._made.students
        own = {"student": students[0] if len(students) == 1 else students, "seeds": list(self._made.seeds)}
        return dataclasses.asdict(recipe.evaluation) | own

    def _teachers_top1(self) -> dict[str, float | None]:
        names = dict.fromkeys(name for method in self._made.methods for name in method.recipe.all_teachers)
        squeezed: dict[str, float] = {}
        for cell in self._made.one_of_each:
            squeezed |= Stages(self._made.run_of(cell), like=self._made.shared).squeezed_top1()
        return {name: squeezed.get(name) for name in names}

    def _scores_of(self, method: Method, records: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        rows = []
        for place, reading in enumerate(self._made.readings):
            found = [record["scores"][place] for _, record in records]
            top1 = tuple(float(score["top1"]) for score in found)
            count = int(records[0][1]["images"])
            score = Score(method.label, reading.key, tuple(seed for seed, _ in records), top1, count)
            rows.append(
                {
                    "method": method.label,
                    "ipc": method.recipe.synthesis.ipc,
                    "student": reading.student,
                    "label_bytes": _mean(score["label_bytes"] for score in found),
                    **{key: value for key, value in score.as_dict().items() if key != "images"},
                }
            )
        return rows

    def _facts_of(
        self,
        method: Method,
        records: Sequence[tuple[int, Mapping[str, Any]]],
        features: FeatureMap,
        network: Teacher,
    ) -> dict[str, Any]:
        found = [record for _, record in records]
        means = [record["similarity"]["mean"] for record in found]
        distilled = self._dataset(method)
        pixels = distilled.images_uint8
        vectors = features_of(network, lambda rows: pixels[rows.start : rows.stop], len(pixels), self._device)
        return {
            "label": method.label,
            "recipe": method.recipe.name,
            "ipc": method.recipe.synthesis.ipc,
            "control": method.control,
            "recipe_yaml": dump_recipe(public_recipe(method.recipe)),
            # The first run of a method may also have gathered what later ones found on the disk.
            "seconds_per_image": statistics.median(float(record["seconds_per_image"]) for record in found),
            "image_steps": found[0]["image_steps"],
            "image_bytes": _mean(record["image_bytes"] for record in found),
            "label_bytes": _mean(record["label_bytes"] for record in found),
            "verifier_top1": _mean(record["verifier_top1"] for record in found),
            "logit_top1": statistics.fmean(record["logit_top1"] for record in found),
            "similarity": {
                "mean": _mean(means),
                "std_over_seeds": None if None in means or len(means) < 2 else statistics.stdev(means),
                "per_class": found[0]["similarity"]["per_class"],
            },
            "histogram": pair_histogram(vectors, distilled.labels),
            "points": {"xy": features.project(vectors), "label": distilled.labels.tolist()},
            "seeds": [seed for seed, _ in records],
            "grid": "assets/grids.png",
        }

    def _full_scores(self) -> list[dict[str, Any]]:
        recipe = self._made.cells[0].recipe
        if not recipe.evaluation.full_data_epochs:
            return []
        rows = []
        for student in self._made.ceilings:
            folder = self._made.full_folder(student)
            seeds = tuple(seed for seed in self._made.seeds if task_file(folder, FULL, seed).is_file())
            if seeds:
                top1 = tuple(read_score(folder, FULL, seed) for seed in seeds)
                score = Score("full", "hard", seeds, top1, len(self._made.shared.data.train))
                rows.append({"student": student, **score.as_dict()})
        return rows

    def _left_out(self, full_data: Sequence[object]) -> dict[str, str]:
        left_out = dict(self._made.failed)
        for method in self._made.methods:
            tried = any(Cell(method, seed).name in left_out for seed in self._made.seeds)
            if not self._records[method.slug] and not tried:
                left_out.setdefault(f"{method.label}, ipc {method.recipe.synthesis.ipc}", "not yet run")
        if not self._made.cells[0].recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
        elif not full_data:
            left_out["all real"] = "not yet run" if self._made.ceilings else "not asked for"
        return left_out

    def write(self, folder: Path, *, notes: Sequence[str], command: str) -> dict[str, Any]:
        """Write comparison.json, the page as Markdown and as one HTML file, and its pictures in assets/; what they say.

        Args:
            folder: Where to.
            notes: What gave way to the protocol, from `under_one_protocol`.
            command: What makes the comparison again.
        """
        comparison = self.as_dict() | {"command": command}
        comparison["protocol"]["notes"] = list(notes)
        write_json(folder / "comparison.json", comparison)
        pictures = draw_comparison(folder / "assets", comparison, self.grids())
        write_bytes(folder / "comparison.md", render_markdown(comparison).encode())
        loaded = {name: path.read_bytes() for name, path in pictures.items()}
        write_bytes(folder / "comparison.html", render_html(comparison, loaded).encode())
        return comparison

    def grids(self) -> dict[str, Tensor]:
        """Images of the first run of each method, class-major, (K * ipc, C, S, S) uint8."""
        return {
            method.label: self._dataset(method).images_uint8 for method in self._made.methods if self._records[method.slug]
        }

    def _dataset(self, method: Method) -> DistilledDataset:
        return load_distilled(self._made.run_of(Cell(method, self._records[method.slug][0][0])).dataset)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or `None` where one is not known."""
    known = list(values)
    return None if None in known else statistics.fmean(known)  # type: ignore[arg-type]


def _differences(scores: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Each method against the controls of its size, and against the first method that is none."""
    controls = {method.label for method in methods if method.control}
    first = next((method.label for method in methods if not method.control), None)
    rows = []
    for a in scores:
        for b in scores:
            same = all(a[key] == b[key] for key in ("ipc", "student", "labels"))
            wanted = b["method"] in controls or b["method"] == first
            if same and wanted and a["method"] not in (b["method"], *controls):
                gap, error = difference(a, b)
                shared = {key: a[key] for key in ("ipc", "student", "labels")}
                known = None if error == float("inf") else error
                rows.append({"a": a["method"], "b": b["method"], **shared, "difference": gap, "error": known})
    return rows


def features_of(network: Teacher, images: Callable[[range], Tensor], count: int, device: torch.device) -> Tensor:
    """Penultimate features, (N, D) float32."""
    return torch.cat([found for _, found in penultimate_features(network, images, count, device=device)])


class _Sample:
    """Real training images, some of each class: the reference of similarity and map.

    Args:
        session: Where the data are.
        network: Whose features.
        device: Where it is.
    """

    def __init__(self, session: Stages, network: Teacher, device: torch.device) -> None:
        data = session.data
        rows = [torch.from_numpy(of_class[:_SAMPLE]) for of_class in data.train.rows_by_class(data.num_classes)]
        self._rows = torch.cat(rows)
        self.labels = torch.from_numpy(data.train.labels)[self._rows]

        def images(part: range) -> Tensor:
            return data.train.images(self._rows[part.start : part.stop])

        self.features = features_of(network, images, len(self._rows), device)
        self._classes = data.num_classes

    def similarity(self) -> dict[str, object]:
        """Mean over pairs of each class."""
        found = intra_class_similarity(self.features, self.labels, self._classes)
        return {"mean": found.mean, "per_class": list(found.per_class), "images_per_class": _SAMPLE}
