"""Which runs a comparison has, where they are, and what is kept of them.

DIR/runs/METHOD/seed-N   an ordinary run, as recipes/prism.py would leave it, dataset included
DIR/cells/               what was measured of each run
DIR/full/                students of all real images
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator

from ..dataset import DistilledDataset, check_folder
from ..evaluation import Labels, Row, StudentTask
from ..models import Teacher
from ..recipe import Recipe
from ..run.context import Loaded, Run
from ..runtime import EVERY_S, Artifact, digest
from .methods import Method


@dataclass(frozen=True)
class StudentSetup:
    """A student architecture and the labels of a dataset that it learns from.

    With `label_epochs` only the first so many epochs of views, used in turn; else as many as the student trains.
    """

    student: str
    labels: Labels
    label_epochs: int | None = None

    @property
    def key(self) -> str:
        """Name of the labels in files and reports: `soft`, `hard`, `image`, `soft-10`."""
        return self.labels if self.label_epochs is None else f"{self.labels}-{self.label_epochs}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods, seeds and students, and the folder of their runs."""

    methods: Sequence[Method]
    setups: Sequence[StudentSetup]  # how students read each dataset; the first student reads all its views at least once
    seeds: Sequence[int]
    folder: Path
    teachers_root: Path
    accelerator: Accelerator
    checkpoint_s: float = EVERY_S
    ceilings: Sequence[str] = ()  # architectures that are trained on all real images too
    loaded: Loaded = field(default_factory=Loaded)  # data and networks that all runs share

    def __post_init__(self) -> None:
        if not self.plain_setups:
            first = self.setups[0].student
            raise ValueError(f"expected a setup of {first!r} with all views, for the runs' own cards; got {self.setups}")

    @property
    def plain_setups(self) -> list[StudentSetup]:
        """Readings of the first student that take all views: those of the runs' own cards."""
        first = self.setups[0].student
        return [setup for setup in self.setups if (setup.student, setup.label_epochs) == (first, None)]

    @property
    def students(self) -> list[str]:
        """Architectures, in order."""
        return list(dict.fromkeys(setup.student for setup in self.setups))

    @property
    def protocol(self) -> Recipe:
        """The recipe whose data, labels and students are those of every run."""
        return self.methods[0].seeded(self.seeds[0])

    @property
    def runs(self) -> list[Run]:
        """Every run, seed by seed: a comparison that is cut short has every method, with fewer seeds."""
        return [self.run_of(method, seed) for seed in self.seeds for method in self.methods]

    @property
    def one_of_each(self) -> list[Run]:
        """The first run of every method."""
        return self.runs[: len(self.methods)]

    def run_of(self, method: Method, seed: int) -> Run:
        """The run of a method with a seed."""
        return Run(
            method.seeded(seed),
            self.folder / "runs" / method.slug / f"seed-{seed}",
            self.teachers_root,
            self.accelerator,
            self.checkpoint_s,
            with_control=False,
            title=f"{method.label}, seed {seed}",
            loaded=self.loaded,
        )

    def common_run(self, run: Run | None = None) -> Run:
        """What belongs to no single run (data, teachers, students of all real images), as a run in DIR itself."""
        return replace(run or self.runs[0], folder=self.folder, title="compare")

    @property
    def network(self) -> Teacher:
        """The network whose features measure similarity: the judge of the first method that is not a control."""
        return next((run for run in self.one_of_each if run.recipe.method != "random"), self.runs[0]).judge

    def record(self, run: Run) -> Artifact:
        """What was measured of a run; the key says what it is made from: recipe, images, weights, and how it is read."""
        setups = [dataclasses.astuple(setup) for setup in self.setups]
        weights = dict(run.artifacts.weights)
        parts = [run.recipe.fingerprint(), run.data.train.content, run.data.test.content, weights, setups]
        if run.recipe.teachers.verifier is None:  # else it measures, and is among the weights
            parts.append(self.network.weights_sha256)
        return Artifact(self.folder / "cells" / f"{name_of(run)}.json", digest(parts)[:16])

    def is_made(self, run: Run) -> bool:
        """Whether a run is there and whole, and made from what is compared now."""
        if not (run.dataset / "README.md").is_file() or not self.record(run).is_whole():
            return False
        differences = check_folder(run.dataset).differences
        if differences:
            run.warn(f"{run.dataset}: {differences[0]}; it is packaged again")
        return not differences

    def full_tasks(self, student: str) -> list[StudentTask]:
        """The students of one architecture on all real images; none where the protocol has no epochs for them."""
        settings = replace(self.protocol.evaluation, student=student, seeds=tuple(self.seeds))
        row, data, view = Row("full", "hard"), self.common_run().data, self.protocol.relabel.view
        folder, seeds = self.folder / "full" / _plain(student), self.seeds if settings.full_data_epochs else ()
        return [StudentTask(row, seed, data.train, data.test, settings, view, data.num_classes, folder) for seed in seeds]


def name_of(run: Run) -> str:
    """Name of a run in files and in the log."""
    return f"{run.recipe.name}-seed{run.recipe.seed}"


def task_of(run: Run, distilled: DistilledDataset, setup: StudentSetup) -> StudentTask:
    """The student of a run that reads its dataset in one way."""
    settings = replace(run.recipe.evaluation, student=setup.student, label_epochs=setup.label_epochs)
    epochs = "" if setup.label_epochs is None else f"-{setup.label_epochs}-epochs"
    folder = run.work / "students" / f"{_plain(setup.student)}{epochs}"
    row, data, view = Row("distilled", setup.labels), run.data, run.recipe.relabel.view
    return StudentTask(row, run.recipe.seed, distilled, data.test, settings, view, data.num_classes, folder)


def _plain(student: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", student)
