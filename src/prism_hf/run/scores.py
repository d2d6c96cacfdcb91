"""The honest table: every row trained under one protocol, each (row, seed) an independent job shared over processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dataset.reader import DistilledDataset
from ..errors import DamagedError
from ..evaluation.diversity import Diversity, UnitSums
from ..evaluation.report import Evaluation, Score, SetFacts
from ..evaluation.students import KEPT, ROWS, Keep, Row, keep_student, train_on_real, train_student
from ..images.pixels import to_reference
from ..images.source import ImageSplit
from ..models.features import penultimate_features
from ..models.teacher import Teacher
from ..models.training import score
from ..recipe.sections import EvaluationRecipe, RelabelView
from ..runtime.checkpoint import Checkpoint
from ..runtime.stop import EVERY_S
from ..runtime.store import digest, read_record, remove_sealed, set_aside, write_record
from .context import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Contest:
    """Who is compared with whom, and how.

    Attributes:
        distilled: The data set to score; `None` where only the ceiling is asked for.
        control: Random real images, packaged the same way, or `None`.
        train: All real training images, or `None`.
        test: The test part.
        settings: The student protocol.
        view: Crops of the ceiling row.
        left_out: Rows that cannot be had, with the reason.
        names: Class names, where there is no data set that has them.
        wanted: Rows that are asked for.
        tested_on: What the test part is, for tables.
    """

    distilled: DistilledDataset | None
    control: DistilledDataset | None
    train: ImageSplit | None
    test: ImageSplit
    settings: EvaluationRecipe
    view: RelabelView
    left_out: Mapping[str, str]
    names: tuple[str, ...] = ()
    wanted: tuple[Row, ...] = ROWS
    tested_on: str = "test images"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, K."""
        return self.names if self.distilled is None else tuple(self.distilled.class_names)

    def source(self, row: Row) -> DistilledDataset:
        """The data set of a row other than the ceiling."""
        source = self.distilled if row.images == "distilled" else self.control
        assert source is not None
        return source

    def rows(self) -> list[Row]:
        """The rows that are wanted and can be had."""
        there = {
            "distilled": self.distilled is not None,
            "random_real": self.control is not None,
            "full": self.train is not None and self.settings.full_data_epochs > 0,
        }
        return [row for row in self.wanted if there[row.images]]

    def tasks(self) -> list[tuple[Row, int]]:
        """(row, seed), the long ceiling runs first, so that processes finish together."""
        return [(row, seed) for row in reversed(self.rows()) for seed in self.settings.seeds]

    def kept(self) -> tuple[Row, int]:
        """(row, seed) of the one student that may be kept: soft labels of the distilled images, first seed."""
        return KEPT, self.settings.seeds[0]


def task_file(folder: Path, row: Row, seed: int) -> Path:
    """Where the score of one student is kept."""
    return folder / f"{row.key}-seed{seed}.json"


def task_key(contest: Contest, row: Row) -> str:
    """What a score is made from: images, labels and views, test images, protocol."""
    if row.images == "full":
        assert contest.train is not None
        content = contest.train.content
    else:
        content = contest.source(row).content
    settings = asdict(replace(contest.settings, seeds=(0,)))
    if contest.settings.label_epochs is None:
        del settings["label_epochs"]  # scores of earlier versions, which did not have it, stay
    view = asdict(contest.view) if row.images == "full" else None
    return digest([row.key, content, contest.test.content, settings, view])[:16]


def read_score(folder: Path, row: Row, seed: int) -> float:
    """Top-1 of one student, in [0, 1].

    Raises:
        DamagedError: Its record is not what was written.
    """
    return float(read_record(task_file(folder, row, seed))["top1"])  # type: ignore[arg-type]


def is_scored(contest: Contest, row: Row, seed: int, folder: Path) -> bool:
    """Whether the score of a student is there and made from what is compared now; a damaged one is set aside."""
    path = task_file(folder, row, seed)
    if not path.is_file():
        return False
    try:
        return read_record(path).get("key") == task_key(contest, row)
    except DamagedError as error:
        log.warning("%s; set aside as %s, the student is trained again", error, set_aside(path).name)
        return False


def _checkpoint_file(score_file: Path) -> Path:
    return score_file.with_suffix(".checkpoint.safetensors")


def run_task(
    contest: Contest,
    row: Row,
    seed: int,
    folder: Path,
    *,
    device: torch.device,
    keep: Keep | None = None,
    every_s: float = EVERY_S,
) -> None:
    """Train and score one student, and keep its score; a score that is there already is left as it is.

    Args:
        contest: What is compared.
        row: The student's row.
        seed: The student's seed.
        folder: Where scores are kept.
        device: Where to train.
        keep: Where to keep the student itself, if it is the one of `Contest.kept`. It is stored before its score: a run
            that is killed between the two makes both again.
        every_s: Seconds between two checkpoints.
    """
    if is_scored(contest, row, seed, folder):
        return
    path, key = task_file(folder, row, seed), task_key(contest, row)
    checkpoint = Checkpoint(_checkpoint_file(path), f"{key}/{seed}", every_s)
    student = _train(contest, row, seed, device, checkpoint)
    top1 = score(student, contest.test, device=device)
    if keep is not None and contest.distilled is not None and (row, seed) == contest.kept():
        count = len(contest.test)
        keep_student(student, contest.distilled, contest.settings, keep, seed=seed, top1=top1, test_count=count)
    write_record(path, {"top1": top1, "key": key})
    checkpoint.clear()


def _train(contest: Contest, row: Row, seed: int, device: torch.device, checkpoint: Checkpoint) -> nn.Module:
    if row.images != "full":
        return train_student(
            contest.source(row), contest.settings, labels=row.labels, seed=seed, device=device, checkpoint=checkpoint
        )
    assert contest.train is not None
    assert row.labels == "hard"
    return train_on_real(
        contest.train,
        contest.settings,
        contest.view,
        num_classes=len(contest.class_names),
        seed=seed,
        device=device,
        checkpoint=checkpoint,
    )


def evaluate_contest(
    run: Run,
    contest: Contest,
    folder: Path,
    *,
    verifier: Teacher | None,
    network: Teacher | None,
    keep: Keep | None = None,
) -> Evaluation:
    """Train the students of a contest, shared over the processes, keep their scores in `folder`, collect the table."""
    device, tasks = run.accelerator.device, contest.tasks()
    left = run.not_yet(tasks, lambda task: is_scored(contest, *task, folder))
    run.say(f"evaluate: {len(tasks) - len(left)} of {len(tasks)} students found, {len(left)} to train")
    if run.accelerator.is_main_process:
        for task in set(tasks) - set(left):  # a process that was killed right after it had written a score
            remove_sealed(_checkpoint_file(task_file(folder, *task)))
    with run.progress("evaluate", len(mine := run.mine(left)), "student") as shown:
        for row, seed in mine:
            shown.doing(f"{row.key}, seed {seed}")
            run_task(contest, row, seed, folder, device=device, keep=keep, every_s=run.checkpoint_s)
            shown.advance()
    run.accelerator.wait_for_everyone()
    return collect(contest, folder, verifier=verifier, network=network, device=device)


def collect(
    contest: Contest, folder: Path, *, verifier: Teacher | None, network: Teacher | None, device: torch.device
) -> Evaluation:
    """Read all scores and measure what needs no training: bytes, verifier accuracy, intra-class similarity.

    Args:
        contest: What was compared.
        folder: Where the scores are.
        verifier: Judges distilled and random real images.
        network: Whose features measure similarity; the verifier where there is one.
        device: Where those networks are.
    """
    scores = []
    for row in contest.rows():
        top1 = tuple(read_score(folder, row, seed) for seed in contest.settings.seeds)
        scores.append(Score(row.images, row.labels, contest.settings.seeds, top1, _count(contest, row)))
    return Evaluation(
        scores=tuple(scores),
        sets=_facts(contest, verifier, network, device),
        student=contest.settings.student,
        epochs=contest.settings.epochs or (contest.distilled.num_epochs if contest.distilled else 0),
        test_count=len(contest.test),
        verifier=verifier.name if verifier else None,
        similarity_network=network.name if network else None,
        left_out=contest.left_out,
        tested_on=contest.tested_on,
    )


def _count(contest: Contest, row: Row) -> int:
    if row.images == "full":
        assert contest.train is not None
        return len(contest.train)
    return len(contest.source(row).labels)


def _facts(
    contest: Contest, verifier: Teacher | None, network: Teacher | None, device: torch.device
) -> dict[str, SetFacts]:
    classes = len(contest.class_names)
    sets: dict[str, SetFacts] = {}
    for name, source in (("distilled", contest.distilled), ("random_real", contest.control)):
        if source is not None:
            pixels = source.images_uint8
            sets[name] = SetFacts(
                image_bytes=source.image_bytes,
                label_bytes=source.label_bytes,
                verifier_top1=agreement(verifier, pixels, source.labels, device),
                diversity=similarity_of(network, partial(_rows_of, pixels), source.labels, classes, device),
            )
    if contest.train is not None:
        labels = torch.from_numpy(contest.train.labels)
        diversity = similarity_of(network, contest.train.images, labels, classes, device)
        sets["full"] = SetFacts(None, None, None, diversity)
    return sets


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


def similarity_of(
    network: Teacher | None, images: Callable[[range], Tensor], labels: Tensor, classes: int, device: torch.device
) -> Diversity:
    """Intra-class similarity of images (rows -> uint8) in the features of a network; all `None` without one."""
    if network is None:
        return Diversity((None,) * classes, None)
    sums = UnitSums(classes)
    for rows, features in penultimate_features(network, images, len(labels), device=device):
        sums.add(features, labels[rows.start : rows.stop])
    return sums.similarity()
