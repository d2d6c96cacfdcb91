"""Which runs a comparison has, where they are, and what is kept of them.

DIR/runs/METHOD/seed-N   an ordinary run, as recipes/prism.py would leave it, dataset included
DIR/cells/               what was measured of each run
DIR/full/                students of all real images
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator

from ..dataset import DistilledDataset, check_folder
from ..evaluation import Row, StudentTask
from ..models import Teacher
from ..recipe import Recipe
from ..run.context import Loaded, Run
from ..runtime import EVERY_S, Artifact, digest
from .methods import Cell, Method, StudentSetup


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods, seeds and students, and the folder of their runs.

    Attributes:
        setups: How students read each dataset. The first student reads all its views at least once.
        folder: DIR.
        ceilings: Architectures that are trained on all real images too.
        loaded: Data and networks that all runs share.
    """

    methods: Sequence[Method]
    setups: Sequence[StudentSetup]
    seeds: Sequence[int]
    folder: Path
    teachers_root: Path
    accelerator: Accelerator
    checkpoint_s: float = EVERY_S
    ceilings: Sequence[str] = ()
    loaded: Loaded = field(default_factory=Loaded)

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

    @cached_property
    def cells(self) -> list[Cell]:
        """Every run, seed by seed: a comparison that is cut short has every method, with fewer seeds."""
        return [Cell(method, seed) for seed in self.seeds for method in self.methods]

    @property
    def one_of_each(self) -> list[Cell]:
        """The first run of every method."""
        return self.cells[: len(self.methods)]

    @property
    def protocol(self) -> Recipe:
        """The recipe whose data, labels and students are those of every run."""
        return self.cells[0].recipe

    @property
    def network(self) -> Teacher:
        """The network whose features measure similarity: the judge of the first method that is not a control."""
        first = next((cell for cell in self.one_of_each if not cell.method.control), self.cells[0])
        return self.common_run(first).judge

    def run_of(self, cell: Cell) -> Run:
        """The run of a cell."""
        return Run(
            cell.recipe,
            self.folder / "runs" / cell.method.slug / f"seed-{cell.seed}",
            self.teachers_root,
            self.accelerator,
            self.checkpoint_s,
            with_control=False,
            title=f"{cell.method.label}, seed {cell.seed}",
            loaded=self.loaded,
        )

    def common_run(self, cell: Cell | None = None) -> Run:
        """What belongs to no single run (data, teachers, students of all real images), as a run in DIR itself."""
        return replace(self.run_of(cell or self.cells[0]), folder=self.folder, title="compare")

    def record(self, cell: Cell) -> Artifact:
        """What was measured of a run; the key says what it is made from: recipe, images, weights, and how it is read."""
        run = self.run_of(cell)
        setups = [dataclasses.astuple(setup) for setup in self.setups]
        weights = dict(run.artifacts.weights)
        parts = [cell.recipe.fingerprint(), run.data.train.content, run.data.test.content, weights, setups]
        if cell.recipe.teachers.verifier is None:  # else it measures, and is among the weights
            parts.append(self.network.weights_sha256)
        return Artifact(self.folder / "cells" / f"{cell.name}.json", digest(parts)[:16])

    def is_made(self, cell: Cell) -> bool:
        """Whether a run is there and whole, and made from what is compared now."""
        dataset = self.run_of(cell).dataset
        if not (dataset / "README.md").is_file() or not self.record(cell).is_whole():
            return False
        differences = check_folder(dataset).differences
        if differences:
            self.common_run().warn(f"{dataset}: {differences[0]}; it is packaged again")
        return not differences

    def task_of(self, cell: Cell, distilled: DistilledDataset, setup: StudentSetup) -> StudentTask:
        """The student of a run that reads its dataset in one way."""
        run = self.run_of(cell)
        settings = replace(cell.recipe.evaluation, student=setup.student, label_epochs=setup.label_epochs)
        epochs = "" if setup.label_epochs is None else f"-{setup.label_epochs}-epochs"
        folder = run.work / "students" / f"{_plain(setup.student)}{epochs}"
        row, data, view = Row("distilled", setup.labels), run.data, cell.recipe.relabel.view
        return StudentTask(row, cell.seed, distilled, data.test, settings, view, data.num_classes, folder)

    def full_tasks(self, student: str) -> list[StudentTask]:
        """The students of one architecture on all real images; none where the protocol has no epochs for them."""
        settings = replace(self.protocol.evaluation, student=student, seeds=tuple(self.seeds))
        row, data, view = Row("full", "hard"), self.common_run().data, self.protocol.relabel.view
        folder, seeds = self.folder / "full" / _plain(student), self.seeds if settings.full_data_epochs else ()
        return [StudentTask(row, seed, data.train, data.test, settings, view, data.num_classes, folder) for seed in seeds]


def _plain(student: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", student)
