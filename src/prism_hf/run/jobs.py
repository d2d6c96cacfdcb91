"""The stage synthesize: each job that is not finished is optimized, goes on from its checkpoint, or is marked as failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import NotFiniteError, SynthesisError
from ..hub.figures import grid
from ..images.pixels import noise, to_reference
from ..models.teacher import Teacher
from ..recipe.plan import SynthesisJob, plan_jobs, share_of
from ..runtime.checkpoint import Checkpoint
from ..runtime.progress import Progress
from ..runtime.tensors import write_tensors
from .artifacts import read_failed
from .context import Run, log_pictures
from .optimize import CHECK_EVERY, JobResult, optimize
from .session import Session
from .statistics import real_statistics

STATE = 2
"""Format of a job's state in its checkpoint; one of another format is not used."""


def optimize_jobs(session: Session) -> None:
    """Optimize every job that is not finished; those whose numbers go bad are listed at the end.

    Raises:
        SynthesisError: Some failed, and a partial dataset was not asked for.
    """
    run, work = session.run, session.work
    jobs = plan_jobs(session.recipe)
    missing = run.not_yet(jobs, work.job_is_whole)
    begun = sum(work.checkpoint_file(job, run.precision).is_file() for job in missing)
    run.say(
        f"synthesize: {len(jobs) - len(missing)} of {len(jobs)} jobs found, {begun} go on from a checkpoint, "
        f"{len(missing) - begun} to start; {run.precision}, a checkpoint every {run.checkpoint_s:g} s"
    )
    if run.accelerator.is_main_process:
        for job in set(jobs) - set(missing):  # a process that was killed right after it had finished a job
            work.forget_state(job)
    if missing:
        _optimize_share(session, missing)
    run.accelerator.wait_for_everyone()
    _report_failed(run)


def _optimize_share(session: Session, missing: Sequence[SynthesisJob]) -> None:
    """Optimize this process's share of the jobs."""
    run, settings = session.run, session.recipe.synthesis
    teachers, verifier = session.teachers(session.recipe.teachers.synthesis_names), session.verifier()
    # What needs a pass over the real images is made by the first process and found by the others.
    with run.accelerator.main_process_first():
        chosen = session.start_images()
        statistics = _conv_statistics(session, teachers)
    solve = partial(optimize, settings=settings, teachers=teachers, verifier=verifier, statistics=statistics)
    mine = share_of(missing, run.accelerator.process_index, run.accelerator.num_processes)
    before = 0
    with run.progress("synthesize", sum(job.iterations for job in mine), "step") as progress:
        for job in mine:
            _one_job(session, job, partial(solve, job, initial=_initial(session, job, chosen)), before, progress)
            before += job.iterations


def _conv_statistics(session: Session, teachers: Mapping[str, Teacher]) -> dict[str, dict[str, Tensor]]:
    """Statistics of the convolutions of every BN teacher over the real images, where the recipe matches them."""
    conv = session.recipe.synthesis.conv
    statistics: dict[str, dict[str, Tensor]] = {}
    if conv is not None:
        split = session.data.train
        for name in session.recipe.teachers.bn_candidates:
            session.run.say(f"synthesize: statistics of the convolutions of {name} on {len(split)} real images")
            statistics[name] = real_statistics(teachers[name], split, root=session.run.teachers_root, patch=conv.patch)
    return statistics


def _initial(session: Session, job: SynthesisJob, chosen: Tensor | None) -> Tensor:
    """Start images of a job, on the device: noise, real images, or those of `chosen` that a teacher has chosen."""
    data, synthesis = session.recipe.data, session.recipe.synthesis
    rows = [label * synthesis.ipc + slot for label, slot in zip(job.classes, job.slots, strict=True)]
    if synthesis.init == "noise":
        shape = (len(job.classes), data.channels, data.size, data.size)
        images = noise(shape, torch.Generator().manual_seed(job.seed + 1))
    elif chosen is not None:
        images = to_reference(chosen[rows])
    else:
        images = to_reference(session.data.train.images(session.initial_rows[rows]))
    return images.to(session.run.accelerator.device)


def _one_job(session: Session, job: SynthesisJob, solve: Callable[..., JobResult], before: int, progress: Progress) -> None:
    """Optimize one job and keep it; `before` counts the steps of earlier jobs, since trackers want rising steps."""
    run, work, done = session.run, session.work, 0
    progress.doing(f"job {job.id}")

    def on_check(entry: dict[str, float]) -> None:
        nonlocal done
        new, done = int(entry["step"]) - done, int(entry["step"])
        # More than one look's steps at once were made by an earlier launch.
        progress.skip(max(0, new - CHECK_EVERY))
        progress.advance(min(new, CHECK_EVERY))
        values = {f"synthesis/{key}": value for key, value in entry.items() if key != "step"}
        run.accelerator.log(values | {"synthesis/job": job.id}, step=before + done)

    result = _result_of(session, job, partial(solve, on_check=on_check))
    if result is None:
        progress.skip(job.iterations - done)
        return
    log_pictures(run.accelerator, "synthesis/images", grid(result.images_uint8, 1), step=before + done)
    notes = {
        "logit_top1": result.logit_top1,
        "verifier_top1": result.verifier_top1,
        "precision": result.precision,
        "history": result.history,
    }
    work.keep_job(job, result.images_uint8, notes)
    work.forget_state(job)


def _result_of(session: Session, job: SynthesisJob, solve: Callable[..., JobResult]) -> JobResult | None:
    """Optimize one job; once more in float32 if its numbers went bad in less; `None` if they are bad in that too."""
    run, work = session.run, session.work
    for precision in dict.fromkeys((run.precision, "float32")):
        key = f"{work.synthesis_key}/{job.id}/{precision}/{STATE}"
        checkpoint = Checkpoint(work.checkpoint_file(job, precision), key, run.checkpoint_s)
        try:
            return solve(checkpoint=checkpoint, precision=precision)
        except NotFiniteError as error:
            again = "; once more in float32" if precision != "float32" else "; the job is marked as failed"
            run.warn(f"{precision}: {error}{again}")
            reason, state = str(error), checkpoint.load()
            assert state is not None
            notes = {"job": job.id, "reason": reason, "precision": precision, "state": dict(state.notes)}
            if precision == "float32":
                write_tensors(work.failed_file(job), state.tensors, notes)
            checkpoint.clear()
    return None


def _report_failed(run: Run) -> None:
    failed = read_failed(run.work)
    if not failed:
        return
    for note in failed:
        run.say(f"failed: {note['reason']}")
    numbers = ", ".join(str(note["job"]) for note in failed)
    if run.allow_partial:
        run.say(f"going on without the images of jobs {numbers} (--allow-partial)")
        return
    raise SynthesisError(
        f"{len(failed)} job(s) failed: {numbers}; the others are finished and kept. {failed[0]['reason']}. "
        "The same command tries them again; --allow-partial packages the others"
    )
