"""The stage synthesize: each job that is not finished is optimised, goes on from its checkpoint, or is marked as failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import NotFiniteError, SynthesisError
from ..hub.figures import grid
from ..images.pixels import noise, to_reference
from ..method.objective import Precision
from ..method.synthesis import CHECK_EVERY, JobResult, synthesize
from ..models.teacher import Teacher
from ..recipe.plan import SynthesisJob, plan_jobs, share_of
from ..runtime.checkpoint import Checkpoint
from ..runtime.progress import Progress
from ..runtime.tensors import write_tensors
from .artifacts import read_failed
from .context import log_pictures
from .session import Session
from .statistics import real_statistics


class Jobs:
    """The synthesis jobs of a run, on this process.

    Args:
        session: The run.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._run, self._recipe, self._work = session, session.run, session.recipe, session.work
        self._start: Tensor | None = None
        self._statistics: dict[str, dict[str, Tensor]] = {}

    def __call__(self) -> None:
        """Optimise every job that is not finished; those whose numbers go bad are listed at the end.

        Raises:
            SynthesisError: Some failed, and a partial data set was not asked for.
        """
        jobs = plan_jobs(self._recipe)
        left = self._run.not_yet(jobs, self._work.job_is_whole)
        begun = sum(self._work.checkpoint_file(job, self._run.precision).is_file() for job in left)
        self._run.say(
            f"synthesize: {len(jobs) - len(left)} of {len(jobs)} jobs found, {begun} go on from a checkpoint, "
            f"{len(left) - begun} to start; {self._run.precision}, a checkpoint every {self._run.checkpoint_s:g} s"
        )
        if self._run.accelerator.is_main_process:
            for job in set(jobs) - set(left):  # a process that was killed right after it had finished a job
                self._work.forget_state(job)
        if left:
            self._optimise(left)
        self._run.accelerator.wait_for_everyone()
        self._tell_failed()

    def _optimise(self, left: list[SynthesisJob]) -> None:
        accelerator = self._run.accelerator
        teachers = self._session.teachers(self._recipe.teachers.synthesis_names)
        verifier = self._session.verifier()
        self._prepare(teachers)
        mine = share_of(left, accelerator.process_index, accelerator.num_processes)
        before = 0
        with self._run.progress("synthesize", sum(job.iterations for job in mine), "step") as shown:
            for job in mine:
                self._one_job(job, teachers, verifier, before, shown)
                before += job.iterations

    def _prepare(self, teachers: Mapping[str, Teacher]) -> None:
        """What needs a pass over the real images: start images that a teacher chooses, statistics of convolutions.

        The first process makes it, the others find it.
        """
        conv, rule = self._recipe.synthesis.conv, self._recipe.teachers
        with self._run.accelerator.main_process_first():
            self._start = self._session.start_images()
            if conv is None:
                return
            split, size = self._session.data.train, self._recipe.data.size
            for name in rule.bn_candidates:
                self._run.say(f"synthesize: statistics of the convolutions of {name} on {len(split)} real images")
                self._statistics[name] = real_statistics(
                    teachers[name],
                    split.images,
                    len(split),
                    f"{split.content}/{size}/{self._recipe.data.channels}",
                    root=self._run.teachers_root,
                    patch=conv.patch,
                    seed=0,
                )

    def _tell_failed(self) -> None:
        failed = read_failed(self._run.work)
        if not failed:
            return
        for note in failed:
            self._run.say(f"failed: {note['reason']}")
        numbers = ", ".join(str(note["job"]) for note in failed)
        if self._run.allow_partial:
            self._run.say(f"going on without the images of jobs {numbers} (--allow-partial)")
            return
        raise SynthesisError(
            f"{len(failed)} job(s) failed: {numbers}; the others are finished and kept. {failed[0]['reason']}. "
            "The same command tries them again; --allow-partial packages the others"
        )

    def _one_job(
        self, job: SynthesisJob, teachers: Mapping[str, Teacher], verifier: Teacher | None, before: int, shown: Progress
    ) -> None:
        """Optimise one job and keep it; `before` counts the steps of earlier jobs, since trackers want rising steps."""
        done = 0
        shown.doing(f"job {job.id}")

        def on_check(entry: dict[str, float]) -> None:
            nonlocal done
            new, done = int(entry["step"]) - done, int(entry["step"])
            # More than one look's steps at once were made by an earlier launch.
            shown.skip(max(0, new - CHECK_EVERY))
            shown.advance(min(new, CHECK_EVERY))
            values = {f"synthesis/{key}": value for key, value in entry.items() if key != "step"}
            self._run.accelerator.log(values | {"synthesis/job": job.id}, step=before + done)

        result = self._result_of(job, teachers, verifier, on_check)
        if result is None:
            shown.skip(job.iterations - done)
            return
        log_pictures(self._run.accelerator, "synthesis/images", grid(result.images_uint8, 1), step=before + done)
        notes = {
            "logit_top1": result.logit_top1,
            "verifier_top1": result.verifier_top1,
            "precision": result.precision,
            "history": result.history,
        }
        self._work.keep_job(job, result.images_uint8, notes)
        self._work.forget_state(job)

    def _result_of(
        self,
        job: SynthesisJob,
        teachers: Mapping[str, Teacher],
        verifier: Teacher | None,
        on_check: Callable[[dict[str, float]], None],
    ) -> JobResult | None:
        """Optimise one job; once more in float32 if its numbers went bad in less; `None` if they are bad in that too."""
        initial = self._initial(job).to(self._run.accelerator.device)
        for precision in dict.fromkeys((self._run.precision, "float32")):
            checkpoint = self._checkpoint(job, precision)
            try:
                return synthesize(
                    job,
                    self._recipe.synthesis,
                    initial,
                    teachers,
                    verifier=verifier,
                    on_check=on_check,
                    checkpoint=checkpoint,
                    precision=precision,
                    statistics=self._statistics,
                )
            except NotFiniteError as error:
                again = "; once more in float32" if precision != "float32" else "; the job is marked as failed"
                self._run.warn(f"{precision}: {error}{again}")
                reason, state = str(error), checkpoint.load()
                assert state is not None
                notes = {"job": job.id, "reason": reason, "precision": precision, "state": dict(state.notes)}
                if precision == "float32":
                    write_tensors(self._work.failed_file(job), state.tensors, notes)
                checkpoint.clear()
        return None

    def _checkpoint(self, job: SynthesisJob, precision: Precision) -> Checkpoint:
        key = f"{self._work.synthesis_key}/{job.id}/{precision}"
        return Checkpoint(self._work.checkpoint_file(job, precision), key, self._run.checkpoint_s)

    def _initial(self, job: SynthesisJob) -> Tensor:
        data = self._recipe.data
        if self._recipe.synthesis.init == "noise":
            generator = torch.Generator().manual_seed(job.seed + 1)
            return noise((len(job.classes), data.channels, data.size, data.size), generator)
        ipc = self._recipe.synthesis.ipc
        rows = [c * ipc + s for c, s in zip(job.classes, job.slots, strict=True)]
        if self._start is not None:
            return to_reference(self._start[rows])
        return to_reference(self._session.data.train.images(self._session.initial_rows[rows]))
