"""Scores for the results table: every row uses one protocol, and each student is an independent task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dataset import DistilledDataset
from ..images import ImageSplit, to_reference
from ..models import AtStep, Teacher, penultimate_features, score
from ..recipe import EvaluationRecipe, RelabelView
from ..runtime import EVERY_S, Artifact, Checkpoint, digest
from .diversity import similarity_of_batches
from .report import score_row
from .students import ROWS, Row, epochs_of, steps_of, train_on_real, train_student

Source = DistilledDataset | ImageSplit
"""The training data of a student: a packaged dataset, or all real training images."""


@dataclass(frozen=True, eq=False)
class StudentTask:
    """A student to train on a source and score on test images; `view` sets how real training images are cropped."""

    row: Row
    seed: int
    source: Source
    test: ImageSplit
    settings: EvaluationRecipe
    view: RelabelView
    num_classes: int
    folder: Path

    @property
    def name(self) -> str:
        """Name in the log."""
        return f"{self.settings.student}, {self.row.key}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return steps_of(self.source, self.settings)

    @property
    def score(self) -> Artifact:
        """The file of the score; its key identifies the images, labels, views, test images and protocol behind it."""
        settings = asdict(replace(self.settings, seeds=(0,)))
        if isinstance(self.source, DistilledDataset):
            settings["epochs"] = epochs_of(self.source, self.settings)[0]  # may be those of the recipe
        view = asdict(self.view) if self.row.images == "full" else None
        key = digest([self.row.key, self.source.content, self.test.content, settings, view])[:16]
        return Artifact(self.folder / f"{self.row.key}-seed{self.seed}.json", key)

    @property
    def checkpoint(self) -> Artifact:
        """The file of the training state."""
        path = self.score.path.with_suffix(".checkpoint.safetensors")
        return Artifact(path, f"{self.score.key}/{self.seed}")


def student_tasks(
    sources: Mapping[str, Source],
    test: ImageSplit,
    settings: EvaluationRecipe,
    view: RelabelView,
    folder: Path,
    *,
    num_classes: int,
    rows: Sequence[Row] = ROWS,
) -> list[StudentTask]:
    """Return a task per seed for each row whose images are in `sources`; the long tasks on all real images come first."""
    wanted = [row for row in rows if row.images in sources and (row.images != "full" or settings.full_data_epochs)]
    return [
        StudentTask(row, seed, sources[row.images], test, settings, view, num_classes, folder)
        for row in reversed(wanted)
        for seed in settings.seeds
    ]


def is_scored(task: StudentTask) -> bool:
    """Return whether the student's score exists and was made from the current inputs."""
    if not task.score.is_whole():
        return False
    task.checkpoint.remove()  # it remains if a process was killed right after writing the score
    return True


def train_and_score(
    task: StudentTask,
    *,
    device: torch.device,
    keep: Callable[[nn.Module, float], None] | None = None,
    every_s: float = EVERY_S,
    at_step: AtStep = lambda _: None,
) -> None:
    """Train one student, score it, and write its score.

    `keep` stores the student itself, with its top-1 in [0, 1]. It is called before the score is written, so a run that is
    killed between the two repeats both. A checkpoint is written every `every_s` seconds.
    """
    checkpoint, source, settings, seed = Checkpoint(task.checkpoint, every_s), task.source, task.settings, task.seed
    how: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "at_step": at_step}
    if isinstance(source, ImageSplit):
        student = train_on_real(source, settings, task.view, num_classes=task.num_classes, seed=seed, **how)
    else:
        student = train_student(source, settings, labels=task.row.labels, seed=seed, **how)
    top1 = score(student, task.test, device=device)
    if keep is not None:
        keep(student, top1)
    task.score.write_json({"top1": top1})
    checkpoint.clear()


def read_scores(tasks: Sequence[StudentTask]) -> list[dict[str, Any]]:
    """Return the rows of the table, each a `score_row`, from the scores of finished tasks.

    Raises:
        DamagedError: A score file was changed after it was written.
    """
    rows = []
    for row in reversed(dict.fromkeys(task.row for task in tasks)):
        students = [task for task in tasks if task.row == row]
        top1 = [float(student.score.read_json()["top1"]) for student in students]
        seeds, count = [student.seed for student in students], len(students[0].source.labels)
        rows.append(score_row(row.images, row.labels, seeds, top1, count))
    return rows


def set_facts(
    source: Source, *, verifier: Teacher | None, network: Teacher | None, num_classes: int, device: torch.device
) -> dict[str, Any]:
    """Return the facts about a set that need no training, for report.json; unknown values are `None`.

    Returns:
        `count`, the number of images. For a packaged dataset, `image_bytes` (encoded), `label_bytes` (including views) and
        `verifier_top1`, the fraction of its images that the verifier classifies correctly. `intra_class_similarity` in the
        features of the network.
    """
    packaged = source if isinstance(source, DistilledDataset) else None
    similarity = similarity_of_batches(features_of(network, source) if network else (), num_classes)
    return {
        "count": len(source.labels),
        "image_bytes": packaged.image_bytes if packaged else None,
        "label_bytes": packaged.label_bytes if packaged else None,
        "verifier_top1": _agreement(verifier, packaged, device) if packaged and verifier else None,
        "intra_class_similarity": {"mean": similarity.mean, "per_class": list(similarity.per_class)},
    }


@torch.no_grad()
def _agreement(verifier: Teacher, source: DistilledDataset, device: torch.device) -> float:
    """Return the fraction of images that a verifier classifies as their label, in [0, 1]."""
    hits = 0
    for images, labels in zip(source.images_uint8.split(256), source.labels.split(256), strict=True):
        logits = verifier.logits(to_reference(images.to(device)))
        hits += int((logits.argmax(1).cpu() == labels).sum())
    return hits / len(source.labels)


def features_of(network: Teacher, source: Source, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of penultimate features (B, D) float32 and labels (B,), of the chosen rows or else of all images."""
    indices = torch.arange(len(source.labels)) if chosen is None else chosen
    labels = torch.as_tensor(source.labels)[indices]

    def images(rows: range) -> Tensor:
        batch = indices[rows.start : rows.stop]
        return source.images(batch) if isinstance(source, ImageSplit) else source.images_uint8[batch]

    for rows, features in penultimate_features(network, images, len(indices)):
        yield features, labels[rows.start : rows.stop]
