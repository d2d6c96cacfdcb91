"""The runs of a comparison, made one after the other by all processes together; a second launch skips what is done.

DIR/runs/METHOD/seed-N   an ordinary run, as recipes/prism.py would leave it, dataset included
DIR/cells/               what was found of each run
DIR/full/                students of all real images
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import tqdm

from ..dataset import DistilledDataset, check_folder, load_distilled
from ..errors import OutputError, SynthesisError
from ..evaluation import Row, StudentTask, label_bytes, student_tasks
from ..models import Teacher, check_network
from ..recipe import Recipe, plan_jobs
from ..run.artifacts import job_file
from ..run.context import Loaded, Run
from ..run.distill import run_stages
from ..run.evaluate import collect, conclude, train_students
from ..run.folder import check_place, claimed_together, is_of_another
from ..run.preflight import check, check_space, missing_space
from ..run.squeeze import squeeze
from ..runtime import DRAFT, EVERY_S, HOLDER, LOCK, Artifact, digest, duration_text, read_proof
from ..runtime.share import unfinished
from .methods import Cell, Method, StudentSetup

FULL = Row("full", "hard")
_OURS = (
    "runs", "cells", "full", "teachers", "work", "logs", "assets", "comparison.html", "comparison.md", "comparison.json",
    LOCK, HOLDER,
)  # fmt: skip


def check_comparison_folder(folder: Path) -> None:
    """Find out whether `folder` is, or can become, the output of a comparison; writes nothing.

    Raises:
        OutputError: It is a file, or holds other things and no comparison.
    """
    check_place(folder, "--output")
    if not folder.is_dir() or (folder / "runs").is_dir():
        return
    if any(path.name not in _OURS and not path.name.startswith(DRAFT) for path in folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and holds no comparison; use another folder (--output DIR)")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Which runs a comparison has, and where they are.

    Attributes:
        methods: From `under_one_protocol`.
        setups: How students read each dataset. The first student reads all its views at least once.
        seeds: One run of each method per seed.
        folder: DIR.
        teachers_root: Where squeezed teachers are kept.
        accelerator: The processes.
        checkpoint_s: Seconds between two checkpoints of a long job.
        ceilings: Architectures that are trained on all real images too; `None` for every student.
        loaded: Data and networks that all runs share.

    Raises:
        ValueError: No setup of the first student takes all views.
    """

    methods: Sequence[Method]
    setups: Sequence[StudentSetup]
    seeds: Sequence[int]
    folder: Path
    teachers_root: Path
    accelerator: Accelerator
    checkpoint_s: float = EVERY_S
    ceilings: Sequence[str] | None = None
    loaded: Loaded = field(default_factory=Loaded)

    def __post_init__(self) -> None:
        if not self.plain_setups:
            raise ValueError(
                f"expected a setup of {self.setups[0].student!r} with all views, for the runs' own cards; "
                f"got {list(self.setups)}"
            )

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
    def full_data_students(self) -> list[str]:
        """Architectures that are trained on all real images; none where the protocol has no epochs for them."""
        if not self.protocol.evaluation.full_data_epochs:
            return []
        return self.students if self.ceilings is None else list(self.ceilings)

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

    def run_of(self, cell: Cell) -> Run:
        """The run of a cell."""
        folder = self.folder / "runs" / cell.method.slug / f"seed-{cell.seed}"
        return self._run(cell, folder, f"{cell.method.label}, seed {cell.seed}")

    def common_run(self, cell: Cell | None = None) -> Run:
        """What belongs to no single run (data, teachers, students of all real images), as a run in DIR itself."""
        return self._run(cell or self.cells[0], self.folder, "compare")

    def _run(self, cell: Cell, folder: Path, title: str) -> Run:
        return Run(
            cell.recipe,
            folder,
            self.teachers_root,
            self.accelerator,
            self.checkpoint_s,
            with_control=False,
            title=title,
            loaded=self.loaded,
        )

    @property
    def network(self) -> Teacher:
        """The network whose features measure similarity: the verifier, or else the logit teacher of the first method."""
        recipe = next((method for method in self.methods if not method.control), self.methods[0]).recipe
        name = recipe.teachers.verifier or recipe.teachers.logit
        return self.common_run().teachers([name])[name]

    def record(self, cell: Cell) -> Artifact:
        """What was found of a run; the key says what it is made from: recipe, images, weights, and how it is read."""
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

    def tasks_of(self, cell: Cell, distilled: DistilledDataset, setup: StudentSetup) -> list[StudentTask]:
        """The student of a run that reads its dataset in one way."""
        run = self.run_of(cell)
        name = re.sub(r"[^A-Za-z0-9_]+", "-", setup.student)
        epochs = "" if setup.label_epochs is None else f"-{setup.label_epochs}-epochs"
        settings = replace(cell.recipe.evaluation, student=setup.student, label_epochs=setup.label_epochs)
        return student_tasks(
            {"distilled": distilled},
            run.data.test,
            settings,
            cell.recipe.relabel.view,
            run.work / "students" / f"{name}{epochs}",
            num_classes=run.data.num_classes,
            rows=[Row("distilled", setup.labels)],
        )

    def full_tasks(self, student: str) -> list[StudentTask]:
        """The students of one architecture on all real images."""
        run = self.common_run()
        settings = replace(self.protocol.evaluation, student=student, seeds=tuple(self.seeds))
        folder = self.folder / "full" / re.sub(r"[^A-Za-z0-9_]+", "-", student)
        view, classes = self.protocol.relabel.view, run.data.num_classes
        return student_tasks(
            {"full": run.data.train}, run.data.test, settings, view, folder, num_classes=classes, rows=[FULL]
        )


def check_comparison(comparison: Comparison) -> None:
    """Look at what can be wrong with any of the methods before anything costs time.

    Raises:
        PrismError: One line about what cannot be used.
    """
    data = comparison.protocol.data
    for student in comparison.students:
        check_network(student, num_classes=data.num_classes, channels=data.channels, size=data.size)
    for cell in comparison.one_of_each:
        check(comparison.common_run(cell), space=False)
    missing = [cell for cell in comparison.cells if not (comparison.folder / "cells" / f"{cell.name}.json").is_file()]
    check_space(sum(missing_space(comparison.run_of(cell)) for cell in missing), comparison.folder)


def make(comparison: Comparison) -> dict[str, str]:
    """Make the teachers, runs and students that are not there yet.

    Returns:
        Runs that failed, by name, with the reason.
    """
    common, failed = comparison.common_run(), dict[str, str]()
    teachers: set[str] = set()
    for cell in comparison.one_of_each:  # most methods have the same, and each is looked at once
        if not teachers.issuperset(cell.recipe.squeezed_teachers):
            teachers |= set(cell.recipe.squeezed_teachers)
            squeeze(comparison.common_run(cell))
    missing = unfinished(comparison.accelerator, comparison.cells, comparison.is_made)
    total, finished, began = len(comparison.cells), len(comparison.cells) - len(missing), time.monotonic()
    common.say(f"compare: {finished} of {total} runs found, {len(missing)} to make")
    with tqdm(total=total, initial=finished, desc="compare", unit="run") as bar:
        for made, cell in enumerate(missing, 1):
            reason = _make_run(comparison, cell)
            if reason is not None:
                failed[cell.name] = reason
            bar.update()
            rest = (time.monotonic() - began) / made * (len(missing) - made)
            estimate = f", about {duration_text(rest)} left" if rest else ""
            common.say(f"{cell.method.label}, seed {cell.seed}: {finished + made} of {total} runs done{estimate}")
    tasks = [task for student in comparison.full_data_students for task in comparison.full_tasks(student)]
    train_students(common, tasks)
    return failed


def _make_run(comparison: Comparison, cell: Cell) -> str | None:
    """Make one run and keep what was found of it; the reason if its synthesis failed.

    What another recipe of that name has left in its folder is moved aside: it was changed since.
    """
    run, began = comparison.run_of(cell), time.perf_counter()
    with claimed_together(run, fresh=is_of_another(run.folder, run.recipe)) as line:
        if line is not None:
            run.say(line)
        try:
            run_stages(run, ("synthesize", "relabel", "package"))
        except SynthesisError as error:  # raised by every process alike
            run.say(f"{cell.name}: {error}; the comparison goes on without it")
            return str(error)
        with comparison.accelerator.main_process_first():
            distilled = load_distilled(run.dataset)
        tasks = [task for setup in comparison.setups for task in comparison.tasks_of(cell, distilled, setup)]
        train_students(run, tasks)
        if comparison.accelerator.is_main_process:
            measured = _conclude(comparison, cell, distilled)
            scores = [_score(comparison, cell, distilled, setup) for setup in comparison.setups]
            facts = _facts(run, len(distilled.labels), measured)
            facts["wall_time_s"] = time.perf_counter() - began  # of this launch
            comparison.record(cell).write_json({"scores": scores, **facts})
        comparison.accelerator.wait_for_everyone()
    return None


def _conclude(comparison: Comparison, cell: Cell, distilled: DistilledDataset) -> Mapping[str, Any]:
    """Write the run's own report and card, with the scores of the first student; the controls are other runs.

    Returns:
        What needed no training.
    """
    run, elsewhere = comparison.run_of(cell), "a run of its own in the comparison that this one belongs to"
    tasks = [task for setup in comparison.plain_setups for task in comparison.tasks_of(cell, distilled, setup)]
    evaluation = collect(
        run,
        tasks[::-1],
        {"distilled": distilled},
        left_out={"random real": elsewhere, "all real": elsewhere},
        verifier=run.verifier,
        network=comparison.network,
    )
    conclude(run, evaluation)
    return evaluation["sets"]["distilled"]


def _score(comparison: Comparison, cell: Cell, distilled: DistilledDataset, setup: StudentSetup) -> dict[str, object]:
    (task,) = comparison.tasks_of(cell, distilled, setup)
    return {
        "student": setup.student,
        "labels": setup.key,
        "top1": float(task.score.read_json()["top1"]),
        "label_bytes": label_bytes(distilled, task.settings, setup.labels),
    }


def _facts(run: Run, images: int, measured: Mapping[str, Any]) -> dict[str, object]:
    jobs = plan_jobs(run.recipe)
    logit_top1 = [float(read_proof(job_file(run.work, job.id)).notes["logit_top1"]) for job in jobs]
    return {
        "images": images,
        "image_bytes": measured["image_bytes"],
        "label_bytes": measured["label_bytes"],
        "verifier_top1": measured["verifier_top1"],
        "similarity": measured["intra_class_similarity"],
        "seconds_per_image": run.times().get("synthesize", 0.0) / images,
        "steps": sum(job.iterations for job in jobs),
        "image_steps": sum(job.iterations * len(job.classes) for job in jobs),
        "logit_top1": statistics.fmean(logit_top1),
    }
