"""The stages of a run, in order: squeeze, synthesize, relabel, package, evaluate; each takes what the last one left.

Every stage shares its independent jobs over the processes and skips what is finished, so a second launch goes on where
the first one stopped, with any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..dataset.provenance import versions
from ..dataset.reader import load_distilled
from ..errors import DamagedError, DataError, StageError
from ..evaluation.report import LABELS, NO_CONTROL, Evaluation
from ..evaluation.students import Keep
from ..hub.figures import draw_diversity
from ..images.source import real_rows
from ..method.relabel import label_images, relabel_batches
from ..models.folder import scored_on, source_facts
from ..models.squeeze import check_squeezed, clear_scratch, is_squeezed, read_squeezed, squeeze_teacher, teacher_folder
from ..recipe.plan import STAGES, SynthesisJob, plan_jobs
from ..recipe.schema import to_dict
from ..runtime.stop import raise_if_stopped
from ..runtime.store import is_sealed, set_aside, write_json
from .artifacts import DISTILLED, RANDOM_REAL, SETS, SQUEEZED, read_failed
from .jobs import Jobs
from .packager import Packager, partial_facts
from .scores import Contest, evaluate_contest
from .session import Session


class Stages(Session):
    """The stages of one run.

    Args:
        run: Recipe, folder and processes.
    """

    def __call__(self, wanted: Sequence[str] = STAGES) -> None:
        """Run the wanted stages, in order."""
        for name in (stage for stage in STAGES if stage in wanted):
            self.run.say(f"stage {name}")
            with self.run.timed(name):
                getattr(self, name)()
                self.run.accelerator.wait_for_everyone()
            raise_if_stopped()
        self._stamp_times()

    def _stamp_times(self) -> None:
        """Put the times into report.json; only now is that of the last stage known."""
        path = self.run.folder / "report.json"
        if self.run.accelerator.is_main_process and path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, report | {"wall_time_s": self.run.times()})

    # -- squeeze ------------------------------------------------------------------------------------------------------

    def squeeze(self) -> None:
        """Train the `squeeze:` teachers that are not there yet."""
        root, names = self.run.teachers_root, self.recipe.squeezed_teachers
        missing = self.run.not_yet(names, self._is_squeezed)
        self.run.say(
            f"squeeze: {len(names) - len(missing)} of {len(names)} teachers found in {root}, {len(missing)} to train"
        )
        device, every_s = self.run.accelerator.device, self.run.checkpoint_s
        with self.run.progress("squeeze", len(mine := self.run.mine(missing)), "teacher") as shown:
            for name in mine:
                shown.doing(name)
                squeeze_teacher(name, self.recipe, self.data, root, device=device, every_s=every_s)
                shown.advance()
        self.run.accelerator.wait_for_everyone()
        scores = self.squeezed_top1()
        for name, top1 in scores.items():
            self.run.say(f"squeeze: {name} scores {100 * top1:.1f} % on the test part")
        if self.run.accelerator.is_main_process:
            write_json(self.run.work / SQUEEZED, scores)  # for `--status`: teachers may lie anywhere

    def _is_squeezed(self, name: str) -> bool:
        """Whether a teacher is there and whole; a damaged one is set aside."""
        folder = teacher_folder(name, self.recipe, self.run.teachers_root)
        if not is_squeezed(folder):
            return False
        try:
            check_squeezed(folder)
        except DamagedError as error:
            self.run.warn(f"{error}; set aside as {set_aside(folder).name}, it is trained again")
            return False
        read_squeezed(folder, self.data)
        clear_scratch(folder)
        return True

    # -- synthesize ---------------------------------------------------------------------------------------------------

    def synthesize(self) -> None:
        """Optimise every job that is not finished."""
        Jobs(self)()

    def _finished_jobs(self) -> list[SynthesisJob]:
        """Jobs whose images are there; all of them, unless a partial data set was asked for.

        Raises:
            StageError: Some are not finished.
        """
        jobs = plan_jobs(self.recipe)
        missing = {job.id for job in self.run.not_yet(jobs, self.work.job_is_whole)}
        failed = {note["job"] for note in read_failed(self.run.work)} if self.run.allow_partial else set()
        if missing - failed or len(missing) == len(jobs):
            raise StageError(f"{len(missing)} of {len(jobs)} synthesis jobs are not finished; run --stage synthesize first")
        return [job for job in jobs if job.id not in missing]

    # -- relabel ------------------------------------------------------------------------------------------------------

    def relabel(self) -> None:
        """Encode the images, then label the decoded bytes: the distilled ones, and random real ones as the control."""
        jobs = self._finished_jobs()
        if self.run.accelerator.is_main_process:
            count = sum(len(job.classes) for job in jobs)
            self._encode(DISTILLED, self.work.distilled_key(jobs), self.work.distilled_images(jobs), count)
            if self.run.wants_control:
                self._encode_control(jobs)
        self._label(SETS)

    def build_control(self) -> None:
        """Only the control: random real images, labelled and packaged, for a data set that was distilled elsewhere.

        Raises:
            PrismError: The real data or the teachers cannot be reached.
        """
        if self.run.accelerator.is_main_process:
            self._encode_control(plan_jobs(self.recipe))
        self._label((RANDOM_REAL,))
        self.run.accelerator.wait_for_everyone()
        if self.run.accelerator.is_main_process:
            Packager(self).control()
        self.run.accelerator.wait_for_everyone()

    def _encode_control(self, jobs: Sequence[SynthesisJob]) -> None:
        """The control has the same classes and slots as the distilled images."""
        ipc = self.recipe.synthesis.ipc
        try:
            chosen = real_rows(self.data, ipc, seed=self.recipe.seed)
        except DataError as error:
            # Only with init noise: the check before the run stops every other recipe here.
            self.run.say(f"no random-real control: {error}")
            return
        places = sorted((c, s) for job in jobs for c, s in zip(job.classes, job.slots, strict=True))
        rows = [int(chosen[c * ipc + s]) for c, s in places]
        images = (((c, s, -1), self.data.train.images([row])[0]) for (c, s), row in zip(places, rows, strict=True))
        self._encode(RANDOM_REAL, self.work.control_key(rows), images, len(rows))

    def _encode(self, name: str, key: str, images: Iterable[tuple[tuple[int, int, int], Tensor]], count: int) -> None:
        if self.work.images_are_whole(name, key):
            self.run.say(f"relabel: {count} {LABELS[name]} images found encoded")
        else:
            self.run.say(f"relabel: encoding {count} {LABELS[name]} images")
            self.work.keep_images(name, key, images, count)

    def _label(self, names: Sequence[str]) -> None:
        self.run.accelerator.wait_for_everyone()
        tasks, left = self._unlabelled(names)
        self.run.say(f"relabel: {len(tasks) - len(left)} of {len(tasks)} epochs of views found, {len(left)} to label")
        if not left:
            return
        settings = self.recipe.relabel
        teachers = list(self.teachers(settings.teachers).values())
        keys = {name: self.work.labels_key(name) for name, _ in left}
        images = {name: self.work.pixels(name) for name in keys}
        with self.run.progress("relabel", len(mine := self.run.mine(left)), "epoch") as shown:
            for name, epoch in mine:
                shown.doing(f"{LABELS[name]}, epoch {epoch}")
                if epoch < 0:
                    parts = label_images(images[name], teachers, settings)
                    self.work.keep_labels(name, keys[name], parts, len(images[name]))
                else:
                    batches = relabel_batches(epoch, images[name], teachers, settings, seed=self.recipe.seed)
                    self.work.keep_epoch(name, epoch, keys[name], batches)
                shown.advance()

    def _unlabelled(self, names: Sequence[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """(set, epoch) of all labels, and of those that are missing; epoch -1 is the images without a view."""
        sets = [name for name in names if is_sealed(self.work.set_file(name, "pixels.npy"))]
        keys = {name: self.work.labels_key(name) for name in sets}
        tasks = [(name, epoch) for name in sets for epoch in range(-1, self.recipe.relabel.epochs)]

        def finished(task: tuple[str, int]) -> bool:
            name, epoch = task
            if epoch < 0:
                return self.work.labels_are_whole(name, keys[name])
            return self.work.epoch_is_whole(name, epoch, keys[name])

        return tasks, self.run.not_yet(tasks, finished)

    # -- package ------------------------------------------------------------------------------------------------------

    def package(self) -> None:
        """Write the data set folder and the control's, each with its provenance; the card says what is not yet run."""
        jobs = self._finished_jobs()
        key = self.work.distilled_key(jobs)
        if not self.work.images_are_whole(DISTILLED, key) or self._unlabelled(SETS)[1]:
            raise StageError("the images are not all labelled; run --stage relabel first")
        if self.run.accelerator.is_main_process:
            packager = Packager(self, partial_facts(self, jobs))
            packager.dataset()
            packager.control()

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Train all students of the table, keep one in DIR/student, write report.json, and complete the card."""
        if not (self.run.dataset / "README.md").is_file():
            raise StageError(f"{self.run.dataset} is not packaged yet; run --stage package first")
        contest = self._contest()
        verifier = self.verifier()
        evaluation = evaluate_contest(
            self.run,
            contest,
            self.run.work / "students",
            verifier=verifier,
            network=verifier or self.teachers([self.recipe.teachers.logit])[self.recipe.teachers.logit],
            keep=Keep(self.run.student, source_facts(self.recipe, self.data), scored_on(self.recipe)),
        )
        if self.run.accelerator.is_main_process:
            self.conclude(evaluation)

    def conclude(self, evaluation: Evaluation) -> None:
        """Write report.json, and the figures into the card."""
        if self.recipe.method == "random":
            evaluation = evaluation.of_random_images()
        sets = {evaluation.name_of(name): facts.diversity for name, facts in evaluation.sets.items()}
        draw_diversity(self.run.dataset / "assets" / "diversity.png", sets, self.data.class_names)
        report = self.report(evaluation)
        write_json(self.run.folder / "report.json", report)
        Packager(self).write_card(self.run.dataset, report)

    def _contest(self) -> Contest:
        left_out = {}
        # Every process opens the tables; the first builds the cache of `datasets`, the others find it.
        with self.run.accelerator.main_process_first():
            distilled = load_distilled(self.run.dataset)
            control = load_distilled(self.run.control) if self.run.control.is_dir() else None
        if self.recipe.method == "random":
            left_out["random real"] = NO_CONTROL
        elif control is None:
            left_out["random real"] = "a class has fewer real training images than ipc"
        if not self.recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: the recipe sets evaluation.full_data_epochs to 0"
        return Contest(
            distilled=distilled,
            control=control,
            train=self.data.train,
            test=self.data.test,
            settings=self.recipe.evaluation,
            view=self.recipe.relabel.view,
            left_out=left_out,
            tested_on=self.recipe.data.tested_on,
        )

    def report(self, evaluation: Evaluation) -> dict[str, object]:
        """report.json: every figure of the table with its seeds and settings."""
        jobs = [self.work.job_notes(job) for job in plan_jobs(self.recipe) if is_sealed(self.work.job_file(job))]
        return {
            "recipe": self.recipe.name,
            "recipe_fingerprint": self.recipe.fingerprint(),
            "seed": self.recipe.seed,
            "ipc": self.recipe.synthesis.ipc,
            "evaluation": evaluation.as_dict(),
            "teachers_test_top1": self.squeezed_top1(),
            "jobs": [{k: note[k] for k in ("job", "logit_top1", "verifier_top1", "precision")} for note in jobs],
            "failed_jobs": [note["job"] for note in read_failed(self.run.work)],
            "hardware": self.run.hardware | {"processes": self.run.accelerator.num_processes},
            "versions": versions(),
            "settings": to_dict(self.recipe),
        }
