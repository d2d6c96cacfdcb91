"""How a comparison is made: its runs one after the other, by all processes together, each found again by a second launch.

DIR/runs/METHOD/seed-N   an ordinary run, as recipes/prism.py would leave it, data set included
DIR/cells/               what was found of each run
DIR/full/                students of all real images
"""

from __future__ import annotations

import dataclasses
import logging
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ..dataset.reader import DistilledDataset, load_distilled
from ..dataset.verify import check_folder
from ..errors import DamagedError, OutputError, SynthesisError
from ..evaluation.report import SetFacts
from ..evaluation.students import Row, label_bytes
from ..models.build import check_network
from ..models.teacher import Teacher
from ..recipe.plan import plan_jobs
from ..recipe.schema import Recipe
from ..run.context import Run, check_place, claimed, is_of_another
from ..run.preflight import check_space
from ..run.scores import Contest, collect, is_scored, read_score, run_task
from ..run.stages import Stages
from ..runtime.lock import HOLDER, LOCK
from ..runtime.progress import Board
from ..runtime.stop import EVERY_S
from ..runtime.store import DRAFT, digest, read_record, set_aside, write_record
from .methods import Cell, Method, StudentSetup

log = logging.getLogger(__name__)
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


class Comparison:
    """The runs of a comparison, made one after the other by all processes together.

    Args:
        methods: From `under_one_protocol`.
        readings: How students read each data set. The first student reads all its views at least once.
        seeds: One run each.
        folder: DIR.
        teachers_root: Where squeezed teachers are kept.
        accelerator: The processes.
        checkpoint_s: Seconds between two checkpoints of a long job.
        ceilings: Architectures that are trained on all real images too; default: every student.

    Raises:
        ValueError: No reading of the first student takes all views.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        readings: Sequence[StudentSetup],
        seeds: Sequence[int],
        *,
        folder: Path,
        teachers_root: Path,
        accelerator: Accelerator,
        checkpoint_s: float = EVERY_S,
        ceilings: Sequence[str] | None = None,
    ) -> None:
        self.methods, self.readings, self.seeds, self.folder = methods, readings, seeds, folder
        first = readings[0].student
        self._plain = [reading for reading in readings if (reading.student, reading.label_epochs) == (first, None)]
        if not self._plain:
            raise ValueError(
                f"expected a reading of {first!r} with all views, for the runs' own cards; got {list(readings)}"
            )
        self.ceilings = list(dict.fromkeys(r.student for r in readings)) if ceilings is None else list(ceilings)
        self._root, self.accelerator, self._checkpoint_s = teachers_root, accelerator, checkpoint_s
        # Seed by seed: a comparison that is cut short has every method, with fewer seeds.
        self.cells = [Cell(method, seed) for seed in seeds for method in methods]
        self.failed: dict[str, str] = {}
        self._whole: set[Path] = set()
        self.shared = self._shared(self.cells[0])

    @property
    def students(self) -> list[str]:
        """Architectures, in order."""
        return list(dict.fromkeys(reading.student for reading in self.readings))

    @property
    def one_of_each(self) -> list[Cell]:
        """The first cell of every method."""
        return self.cells[: len(self.methods)]

    def _shared(self, cell: Cell, like: Stages | None = None, board: Board | None = None) -> Stages:
        """What belongs to no single run: data, teachers, students of all real images."""
        return Stages(replace(self.run_of(cell, board), folder=self.folder), like=like)

    def run_of(self, cell: Cell, board: Board | None = None) -> Run:
        """The run of a cell; `board` is the bar that its stages move."""
        folder = self.folder / "runs" / cell.method.slug / f"seed-{cell.seed}"
        return Run(cell.recipe, folder, self._root, self.accelerator, self._checkpoint_s, with_control=False, board=board)

    def check(self) -> None:
        """Look at what can be wrong with any of the methods before anything costs time; see `Session.check`."""
        data = self.cells[0].recipe.data
        for student in self.students:
            check_network(student, num_classes=data.num_classes, channels=data.channels, size=data.size)
        for cell in self.one_of_each:
            self._shared(cell, self.shared).check(space=False)
        left = [cell for cell in self.cells if not self.record_file(cell).is_file()]
        check_space(sum(Stages(self.run_of(cell), like=self.shared).missing_space() for cell in left), self.folder)

    def __call__(self) -> None:
        """Make what is not there yet."""
        run = self.shared.run
        teachers = {name for cell in self.one_of_each for name in cell.recipe.squeezed_teachers}
        tasks = self._full_tasks()
        board = Board(len(teachers) + len(self.cells) + len(tasks), run.say)
        self._squeeze(board)
        board.end(done := len(teachers))
        left = run.not_yet(self.cells, self.is_found)
        run.say(f"compare: {len(self.cells) - len(left)} of {len(self.cells)} runs found, {len(left)} to make")
        board.found(len(self.cells) - len(left))
        done += len(self.cells) - len(left)
        for number, cell in enumerate(left, start=done + 1):
            board.begin(f"{cell.method.label}, seed {cell.seed}")
            self._make(cell, board)
            board.end(number)
        self._full_data(tasks, board)
        self.accelerator.wait_for_everyone()
        board.close()

    def _squeeze(self, board: Board) -> None:
        """Train the teachers that are not there; most methods have the same, and each is looked at once."""
        board.begin("teachers")
        named: set[str] = set()
        for cell in self.one_of_each:
            if not named.issuperset(cell.recipe.squeezed_teachers):
                named |= set(cell.recipe.squeezed_teachers)
                self._shared(cell, self.shared, board).squeeze()
                self.accelerator.wait_for_everyone()

    # -- one run ------------------------------------------------------------------------------------------------------

    def record_file(self, cell: Cell) -> Path:
        """Where what was found of a run is kept."""
        return self.folder / "cells" / f"{cell.name}.json"

    def _key(self, cell: Cell) -> str:
        """What a cell is made from: recipe, images, weights, and how it is read."""
        stages = Stages(self.run_of(cell), like=self.shared)
        readings = [dataclasses.astuple(reading) for reading in self.readings]
        data, recipe = self.shared.data, cell.recipe
        parts = [recipe.fingerprint(), data.train.content, data.test.content, stages.work.weights, readings]
        if recipe.teachers.verifier is None:  # else it measures, and is among the weights
            parts.append(self.network().weights_sha256)
        return digest(parts)[:16]

    def is_found(self, cell: Cell) -> bool:
        """Whether a run is there, and made from what is compared now."""
        path, dataset = self.record_file(cell), self.run_of(cell).dataset
        if not path.is_file() or not (dataset / "README.md").is_file():
            return False
        try:
            if read_record(path).get("key") != self._key(cell):
                return False
        except DamagedError as error:
            log.warning("%s; set aside as %s, it is made again", error, set_aside(path).name)
            return False
        if dataset not in self._whole and not (differences := check_folder(dataset).differences):
            self._whole.add(dataset)
        elif dataset not in self._whole:
            log.warning("%s: %s; it is packaged again", dataset, differences[0])
        return dataset in self._whole

    def _make(self, cell: Cell, board: Board) -> None:
        run = self.run_of(cell, board)
        stages, began = Stages(run, like=self.shared), time.perf_counter()
        with _claimed(run):
            try:
                stages(("synthesize", "relabel", "package"))
            except SynthesisError as error:  # raised by every process alike
                self.failed[cell.name] = str(error)
                run.say(f"{cell.name}: {error}; the comparison goes on without it")
                return
            with self.accelerator.main_process_first():
                distilled = load_distilled(run.dataset)
            self._train(run, cell, distilled)
            if self.accelerator.is_main_process:
                measured = self._conclude(run, stages, distilled)
                scores = [self._score(run, cell, distilled, reading) for reading in self.readings]
                facts = self._facts(run, stages, len(distilled.labels), measured)
                facts["wall_time_s"] = time.perf_counter() - began  # of this launch
                write_record(self.record_file(cell), {"key": self._key(cell), "scores": scores, **facts})
            self.accelerator.wait_for_everyone()

    def _contest(self, recipe: Recipe, distilled: DistilledDataset, reading: StudentSetup) -> Contest:
        settings = replace(recipe.evaluation, student=reading.student, label_epochs=reading.label_epochs)
        data = self.shared.data
        return Contest(distilled, None, data.train, data.test, settings, recipe.relabel.view, {})

    def _students(self, run: Run, reading: StudentSetup) -> Path:
        name = re.sub(r"[^A-Za-z0-9_]+", "-", reading.student)
        return run.work / "students" / (name if reading.label_epochs is None else f"{name}-{reading.label_epochs}-epochs")

    def _conclude(self, run: Run, stages: Stages, distilled: DistilledDataset) -> SetFacts:
        """The run's own report and card, with the scores of the first student; the controls are other runs.

        Returns:
            What needed no training.
        """
        elsewhere = "a run of its own in the comparison that this one belongs to"
        contest = replace(
            self._contest(run.recipe, distilled, self._plain[0]),
            train=None,
            wanted=tuple(Row("distilled", reading.labels) for reading in self._plain),
            left_out={"random real": elsewhere, "all real": elsewhere},
            tested_on=run.recipe.data.tested_on,
        )
        evaluation = collect(
            contest,
            self._students(run, self._plain[0]),
            verifier=stages.verifier(),
            network=self.network(),
            device=self.accelerator.device,
        )
        stages.conclude(evaluation)
        return evaluation.sets["distilled"]

    def _train(self, run: Run, cell: Cell, distilled: DistilledDataset) -> None:
        def finished(reading: StudentSetup) -> bool:
            contest = self._contest(cell.recipe, distilled, reading)
            return is_scored(contest, Row("distilled", reading.labels), cell.seed, self._students(run, reading))

        left = run.not_yet(self.readings, finished)
        with run.progress("evaluate", len(mine := run.mine(left)), "student") as shown:
            for reading in mine:
                shown.doing(f"{reading.student}, {reading.key}")
                run_task(
                    self._contest(cell.recipe, distilled, reading),
                    Row("distilled", reading.labels),
                    cell.seed,
                    self._students(run, reading),
                    device=self.accelerator.device,
                    every_s=self._checkpoint_s,
                )
                shown.advance()
        self.accelerator.wait_for_everyone()

    def _score(self, run: Run, cell: Cell, distilled: DistilledDataset, reading: StudentSetup) -> dict[str, object]:
        row = Row("distilled", reading.labels)
        top1 = read_score(self._students(run, reading), row, cell.seed)
        return {
            "student": reading.student,
            "labels": reading.key,
            "top1": top1,
            "label_bytes": label_bytes(distilled, self._contest(cell.recipe, distilled, reading).settings, reading.labels),
        }

    def _facts(self, run: Run, stages: Stages, images: int, measured: SetFacts) -> dict[str, object]:
        jobs = plan_jobs(run.recipe)
        logit_top1 = [float(stages.work.job_notes(job)["logit_top1"]) for job in jobs]
        return {
            "images": images,
            "image_bytes": measured.image_bytes,
            "label_bytes": measured.label_bytes,
            "verifier_top1": measured.verifier_top1,
            "similarity": {"mean": measured.diversity.mean, "per_class": list(measured.diversity.per_class)},
            "seconds_per_image": run.times().get("synthesize", 0.0) / images,
            "steps": sum(job.iterations for job in jobs),
            "image_steps": sum(job.iterations * len(job.classes) for job in jobs),
            "logit_top1": statistics.fmean(logit_top1),
        }

    def network(self) -> Teacher:
        """Whose features measure similarity: the verifier, or else the logit teacher of the first method."""
        recipe = next((method for method in self.methods if not method.control), self.methods[0]).recipe
        name = recipe.teachers.verifier or recipe.teachers.logit
        return self.shared.teachers([name])[name]

    # -- the ceiling --------------------------------------------------------------------------------------------------

    def _full_tasks(self) -> list[tuple[str, int]]:
        """(student, seed) of the students of all real images; none where the protocol has no epochs for them."""
        if not self.cells[0].recipe.evaluation.full_data_epochs:
            return []
        return [(student, seed) for student in self.ceilings for seed in self.seeds]

    def _full_data(self, tasks: Sequence[tuple[str, int]], board: Board) -> None:
        """Students of all real images, hard labels."""
        if not tasks:
            return
        board.begin("all real images")
        recipe, run = self.cells[0].recipe, replace(self.shared.run, board=board)
        contests = {student: self._ceiling(recipe, student) for student in self.ceilings}
        folders = {student: self.full_folder(student) for student in self.ceilings}
        left = run.not_yet(tasks, lambda task: is_scored(contests[task[0]], FULL, task[1], folders[task[0]]))
        run.say(
            f"compare: {len(tasks) - len(left)} of {len(tasks)} students of all real images found, {len(left)} to train"
        )
        with run.progress("all real", len(mine := run.mine(left)), "student") as shown:
            for student, seed in mine:
                shown.doing(f"{student}, seed {seed}")
                run_task(
                    contests[student],
                    FULL,
                    seed,
                    folders[student],
                    device=self.accelerator.device,
                    every_s=self._checkpoint_s,
                )
                shown.advance()

    def full_folder(self, student: str) -> Path:
        """Where the scores of one architecture on all real images are."""
        return self.folder / "full" / re.sub(r"[^A-Za-z0-9_]+", "-", student)

    def _ceiling(self, recipe: Recipe, student: str) -> Contest:
        settings, data = replace(recipe.evaluation, student=student), self.shared.data
        return Contest(None, None, data.train, data.test, settings, recipe.relabel.view, {}, data.class_names)


@contextmanager
def _claimed(run: Run) -> Iterator[None]:
    """The folder of one run is held by the first process, and has its recipe before the others go on.

    What another recipe of that name has left there is moved aside: it was changed since.
    """
    if run.accelerator.is_main_process:
        with claimed(run.folder, run.recipe, fresh=is_of_another(run.folder, run.recipe)) as line:
            if line is not None:
                run.say(line)
            run.accelerator.wait_for_everyone()
            yield
    else:
        run.accelerator.wait_for_everyone()
        yield
