"""The honest table: every row trained under one protocol, each student an independent task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dataset import DistilledDataset
from ..images import ImageSplit, to_reference
from ..models import Teacher, penultimate_features, score
from ..recipe import EvaluationRecipe, RelabelView
from ..runtime import EVERY_S, Artifact, digest
from ..runtime.checkpoint import Checkpoint
from .diversity import Diversity, UnitSums
from .report import Score, SetFacts
from .students import ROWS, Row, train_on_real, train_student

Source = DistilledDataset | ImageSplit
"""What a student learns from: a packaged dataset, or all real training images."""


@dataclass(frozen=True, eq=False)
class StudentTask:
    """One student to train and score.

    Attributes:
        row: Its row of the table.
        seed: Of its weights.
        source: What it learns from.
        test: The real images that it is scored on.
        settings: The student protocol.
        view: Crops of real training images.
        num_classes: K.
        folder: Where scores are kept.
    """

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
        """For the log."""
        return f"{self.settings.student}, {self.row.key}, seed {self.seed}"

    @property
    def score(self) -> Artifact:
        """Its score; the key says which images, labels, views, test images and protocol it is made from."""
        settings = asdict(replace(self.settings, seeds=(0,)))
        view = asdict(self.view) if self.row.images == "full" else None
        key = digest([self.row.key, self.source.content, self.test.content, settings, view])[:16]
        return Artifact(self.folder / f"{self.row.key}-seed{self.seed}.json", key)

    @property
    def checkpoint(self) -> Artifact:
        """The state of its training."""
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
    """A task for each row that can be had and each seed; the long ones on all real images come first.

    Args:
        sources: `distilled`, `random_real`, `full`: those that there are.
        test: The real images that students are scored on.
        settings: The student protocol.
        view: Crops of real training images.
        folder: Where scores are kept.
        num_classes: K.
        rows: Rows that are wanted.
    """
    wanted = [row for row in rows if row.images in sources and (row.images != "full" or settings.full_data_epochs)]
    return [
        StudentTask(row, seed, sources[row.images], test, settings, view, num_classes, folder)
        for row in reversed(wanted)
        for seed in settings.seeds
    ]


def is_scored(task: StudentTask) -> bool:
    """Whether the score of a student is there and made from what is compared now."""
    if not task.score.is_whole():
        return False
    task.checkpoint.remove()  # a process was killed right after it had written the score
    return True


def train_and_score(
    task: StudentTask,
    *,
    device: torch.device,
    keep: Callable[[nn.Module, float], None] | None = None,
    every_s: float = EVERY_S,
) -> None:
    """Train and score one student, and keep its score.

    Args:
        task: The student.
        device: Where to train.
        keep: Stores the student itself, with its top-1 in [0, 1]. It is called before the score is written: a run that is
            killed between the two makes both again.
        every_s: Seconds between two checkpoints.
    """
    checkpoint = Checkpoint(task.checkpoint, every_s)
    if isinstance(task.source, ImageSplit):
        student = train_on_real(
            task.source,
            task.settings,
            task.view,
            num_classes=task.num_classes,
            seed=task.seed,
            device=device,
            checkpoint=checkpoint,
        )
    else:
        labels = task.row.labels
        student = train_student(
            task.source, task.settings, labels=labels, seed=task.seed, device=device, checkpoint=checkpoint
        )
    top1 = score(student, task.test, device=device)
    if keep is not None:
        keep(student, top1)
    task.score.write_json({"top1": top1})
    checkpoint.clear()


def read_scores(tasks: Sequence[StudentTask]) -> tuple[Score, ...]:
    """The rows of the table, from the scores of finished tasks.

    Raises:
        DamagedError: A score is not what was written.
    """
    by_row: dict[Row, list[StudentTask]] = {}
    for task in tasks:
        by_row.setdefault(task.row, []).append(task)
    rows = []
    for row, students in reversed(by_row.items()):
        top1 = tuple(float(student.score.read_json()["top1"]) for student in students)
        count = len(students[0].source.labels)
        rows.append(Score(row.images, row.labels, tuple(student.seed for student in students), top1, count))
    return tuple(rows)


# -- what needs no training -------------------------------------------------------------------------------------------


def set_facts(
    sources: Mapping[str, Source],
    *,
    verifier: Teacher | None,
    network: Teacher | None,
    num_classes: int,
    device: torch.device,
) -> dict[str, SetFacts]:
    """Bytes, verifier accuracy and intra-class similarity of each source.

    Args:
        sources: `distilled`, `random_real`, `full`: those that there are.
        verifier: Judges packaged images.
        network: Its features measure similarity.
        num_classes: K.
        device: Where those networks are.
    """
    facts = {}
    for name, source in sources.items():
        if isinstance(source, ImageSplit):
            labels = torch.from_numpy(source.labels)
            diversity = similarity_of(network, source.images, labels, num_classes)
            facts[name] = SetFacts(None, None, None, diversity)
        else:
            pixels, labels = source.images_uint8, source.labels
            facts[name] = SetFacts(
                image_bytes=source.image_bytes,
                label_bytes=source.label_bytes,
                verifier_top1=agreement(verifier, pixels, labels, device),
                diversity=similarity_of(network, partial(_rows_of, pixels), labels, num_classes),
            )
    return facts


def _rows_of(images: Tensor, rows: range) -> Tensor:
    return images[rows.start : rows.stop]


@torch.no_grad()
def agreement(verifier: Teacher | None, images: Tensor, labels: Tensor, device: torch.device) -> float | None:
    """Share of the images (N, C, H, W) uint8 that a verifier puts in their class, in [0, 1]; `None` without one."""
    if verifier is None:
        return None
    hits = 0
    for start in range(0, len(images), 256):
        logits = verifier.logits(to_reference(images[start : start + 256].to(device)))
        hits += int((logits.argmax(1).cpu() == labels[start : start + 256]).sum())
    return hits / len(images)


def similarity_of(network: Teacher | None, images: Callable[[range], Tensor], labels: Tensor, classes: int) -> Diversity:
    """Intra-class similarity of images (rows -> uint8) in the features of a network; all `None` without one."""
    if network is None:
        return Diversity((None,) * classes, None)
    sums = UnitSums(classes)
    for rows, features in penultimate_features(network, images, len(labels)):
        sums.add(features, labels[rows.start : rows.stop])
    return sums.similarity()
