"""The runs of a comparison, their folders, and the files kept for each.

DIR/runs/METHOD/seed-N   an ordinary run with its dataset, as written by recipes/prism.py; with several sets of teachers,
                         DIR/runs/METHOD/teachers-T-seed-N
DIR/cells/               measurements of each run
DIR/full/                students trained on all real images
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
    """A student architecture, and which labels of a dataset it learns from.

    If `label_epochs` is set, training cycles through that many first epochs of views; else every epoch has its own views.
    """

    student: str
    labels: Labels
    label_epochs: int | None = None

    @property
    def key(self) -> str:
        """Name of the labels in files and reports, such as `soft`, `hard`, `image` or `soft-10`."""
        return self.labels if self.label_epochs is None else f"{self.labels}-{self.label_epochs}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The methods, seeds and students of a comparison, and the folder of its runs."""

    methods: Sequence[Method]
    setups: Sequence[StudentSetup]  # students of each dataset; at least one setup of the first student uses all views
    seeds: Sequence[int]
    folder: Path
    teachers_root: Path
    accelerator: Accelerator
    checkpoint_s: float = EVERY_S
    ceilings: Sequence[str] = ()  # architectures that are also trained on all real images
    teacher_seeds: Sequence[int] = ()  # one set of teachers for each, and every seed with every set; empty: the recipe's
    loaded: Loaded = field(default_factory=Loaded)  # data and networks shared by all runs

    def __post_init__(self) -> None:
        if not self.plain_setups:
            first = self.setups[0].student
            raise ValueError(f"expected a setup of {first!r} with all views for the cards of the runs; got {self.setups}")

    @property
    def plain_setups(self) -> list[StudentSetup]:
        """Setups of the first student that use all views; their scores are in the cards of the runs."""
        first = self.setups[0].student
        return [setup for setup in self.setups if (setup.student, setup.label_epochs) == (first, None)]

    @property
    def students(self) -> list[str]:
        """Student architectures, in order."""
        return list(dict.fromkeys(setup.student for setup in self.setups))

    @property
    def protocol(self) -> Recipe:
        """The recipe whose data, labels and students every run uses."""
        return self.methods[0].seeded(self.seeds[0], *self.teacher_seeds[:1])

    @property
    def draws(self) -> list[tuple[int, int | None]]:
        """The seed of each run of a method, and that of its teachers (`None`: the recipe's own)."""
        return [(seed, teachers) for seed in self.seeds for teachers in self.teacher_seeds or (None,)]

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an interrupted comparison has every method, with fewer seeds."""
        return [self.run_of(method, *draw) for draw in self.draws for method in self.methods]

    @property
    def one_of_each(self) -> list[Run]:
        """The first run of every method."""
        return self.runs[: len(self.methods)]

    def run_of(self, method: Method, seed: int, teachers: int | None) -> Run:
        """Return the run of a method with a seed and a seed of its teachers; see `draws`."""
        one_set = "" if teachers is None else f"teachers-{teachers}-"
        return Run(
            method.seeded(seed, teachers),
            self.folder / "runs" / method.slug / f"{one_set}seed-{seed}",
            self.teachers_root,
            self.accelerator,
            self.checkpoint_s,
            with_control=False,
            title=f"{method.label}, seed {seed}" + ("" if teachers is None else f", teachers {teachers}"),
            loaded=self.loaded,
        )

    def common_run(self, run: Run | None = None) -> Run:
        """Return a run in DIR itself, for what all runs share: data, teachers, and students on all real images."""
        return replace(run or self.runs[0], folder=self.folder, title="compare")

    @property
    def network(self) -> Teacher:
        """The network whose features define similarity: the judge of the first method that is not a control."""
        return next((run for run in self.one_of_each if run.recipe.method != "random"), self.runs[0]).judge

    def record(self, run: Run) -> Artifact:
        """Return the file with a run's measurements; its key identifies recipe, real images, weights and student setups."""
        setups = [dataclasses.astuple(setup) for setup in self.setups]
        weights = dict(run.artifacts.weights)
        parts = [run.recipe.fingerprint(), run.data.train.content, run.data.test.content, weights, setups]
        if run.recipe.teachers.verifier is None:  # otherwise the network is the verifier, whose weights are included above
            parts.append(self.network.weights_sha256)
        return Artifact(self.folder / "cells" / f"{name_of(run)}.json", digest(parts)[:16])

    def is_made(self, run: Run) -> bool:
        """Return whether a run is complete, undamaged, and made from the current inputs."""
        if not (run.dataset / "README.md").is_file() or not self.record(run).is_whole():
            return False
        differences = check_folder(run.dataset).differences
        if differences:
            run.warn(f"{run.dataset}: {differences[0]}; packaging it again")
        return not differences

    def full_tasks(self, student: str) -> list[StudentTask]:
        """Return the tasks of one architecture on all real images; none without all of them, or without epochs for them."""
        if not self.protocol.data.has_all_images:
            return []
        settings = replace(self.protocol.evaluation, student=student, seeds=tuple(self.seeds))
        row, data, view = Row("full", "hard"), self.common_run().data, self.protocol.relabel.view
        folder, seeds = self.folder / "full" / _plain(student), self.seeds if settings.full_data_epochs else ()
        return [StudentTask(row, seed, data.train, data.test, settings, view, data.num_classes, folder) for seed in seeds]


def name_of(run: Run) -> str:
    """Return the name of a run in files and in the log."""
    # The folder names the teachers, if there are several sets of them.
    return f"{run.recipe.name}-{run.folder.name.replace('seed-', 'seed')}"


def task_of(run: Run, distilled: DistilledDataset, setup: StudentSetup) -> StudentTask:
    """Return the task of training one student on the dataset of a run."""
    settings = replace(run.recipe.evaluation, student=setup.student, label_epochs=setup.label_epochs)
    epochs = "" if setup.label_epochs is None else f"-{setup.label_epochs}-epochs"
    folder = run.work / "students" / f"{_plain(setup.student)}{epochs}"
    row, data, view = Row("distilled", setup.labels), run.data, run.recipe.relabel.view
    return StudentTask(row, run.recipe.seed, distilled, data.test, settings, view, data.num_classes, folder)


def _plain(student: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", student)
