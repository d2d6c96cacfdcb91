"""The stage synthesize: optimize each job that is not finished, from its checkpoint if it has one, or mark it as failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import NotFiniteError, SynthesisError
from ..hub.figures import grid
from ..images.pixels import noise, to_reference
from ..images.source import real_rows
from ..method.start_images import SCORED, start_images
from ..method.synthesis import CHECK_EVERY, JobResult
from ..method.synthesis import synthesize as optimize
from ..recipe.plan import SynthesisJob, plan_jobs
from ..runtime.checkpoint import Checkpoint
from ..runtime.share import Progress
from ..runtime.tensors import open_rows, write_rows, write_tensors
from .artifacts import read_failed
from .context import Run
from .statistics import real_statistics
from .trackers import log_pictures

Statistics = Mapping[str, Mapping[str, Tensor]]


def synthesize(run: Run) -> None:
    """Optimize every job that is not finished; those whose numbers go bad are listed at the end.

    Raises:
        SynthesisError: Some failed, and a partial dataset was not asked for.
    """
    jobs = plan_jobs(run.recipe)
    statistics: dict[str, Mapping[str, Tensor]] = {}

    def prepare(missing: list[SynthesisJob]) -> None:
        tell_what_is_left(run, missing)
        statistics.update(make_ready(run))

    run.share(
        "synthesize",
        jobs,
        is_done=partial(is_finished, run),
        do=lambda job, progress: one_job(run, job, statistics, progress),
        prepare=prepare,
        unit="job",
        name=lambda job: f"job {job.id}",
        size=lambda job: job.iterations,
        steps="step",
    )
    tell_failed(run)


def is_finished(run: Run, job: SynthesisJob) -> bool:
    """Whether the images of a job are there and whole."""
    if not run.artifacts.job(job).is_whole():
        return False
    run.artifacts.forget_unfinished(job)  # a process was killed right after it had finished the job
    return True


def tell_what_is_left(run: Run, missing: Sequence[SynthesisJob]) -> None:
    """Say how many jobs go on from a checkpoint."""
    begun = sum(run.artifacts.checkpoint(job, run.precision).path.is_file() for job in missing)
    run.say(
        f"synthesize: {begun} jobs go on from a checkpoint, {len(missing) - begun} start; {run.precision}, "
        f"a checkpoint every {run.checkpoint_s:g} s"
    )


def make_ready(run: Run) -> Statistics:
    """Make what needs a pass over the real images: start images that a teacher chooses, statistics of convolutions.

    The first process makes it, the others find it.
    """
    conv, files = run.recipe.synthesis.conv, run.artifacts
    with run.accelerator.main_process_first():
        if run.recipe.synthesis.init in SCORED and not files.start.is_whole():
            name = run.recipe.teachers.logit
            images = start_images(run.recipe, run.data, run.teachers([name])[name], device=run.accelerator.device)
            write_rows(files.start, [images.numpy()], tuple(images.shape), "uint8")
        if conv is None:
            return {}
        teachers = run.teachers(run.recipe.teachers.bn_candidates)
        return {
            name: real_statistics(teacher, run.data.train, root=run.teachers_root, patch=conv.patch, seed=0)
            for name, teacher in teachers.items()
        }


def tell_failed(run: Run) -> None:
    """List the jobs that failed.

    Raises:
        SynthesisError: There are some, and a partial dataset was not asked for.
    """
    failed = read_failed(run.work)
    for note in failed:
        run.say(f"failed: {note['reason']}")
    numbers = ", ".join(str(note["job"]) for note in failed)
    if failed and run.allow_partial:
        run.say(f"going on without the images of jobs {numbers} (--allow-partial)")
    elif failed:
        raise SynthesisError(
            f"{len(failed)} job(s) failed: {numbers}; the others are finished and kept. {failed[0]['reason']}. "
            "The same command tries them again; --allow-partial packages the others"
        )


def one_job(run: Run, job: SynthesisJob, statistics: Statistics, progress: Progress) -> None:
    """Optimize one job and keep its images."""
    before = progress.count  # trackers want steps that rise from job to job
    done = 0

    def on_check(entry: dict[str, float]) -> None:
        nonlocal done
        new, done = int(entry["step"]) - done, int(entry["step"])
        # More than one look's steps at once were made by an earlier launch.
        progress.skip(max(0, new - CHECK_EVERY))
        progress.advance(min(new, CHECK_EVERY))
        values = {f"synthesis/{key}": value for key, value in entry.items() if key != "step"}
        run.accelerator.log(values | {"synthesis/job": job.id}, step=before + done)

    result = result_of(run, job, statistics, on_check)
    if result is None:
        return
    log_pictures(run.accelerator, "synthesis/images", grid(result.images_uint8, 1), step=before + done)
    notes = {
        "job": job.id,
        "logit_top1": result.logit_top1,
        "verifier_top1": result.verifier_top1,
        "precision": result.precision,
        "history": result.history,
    }
    write_tensors(run.artifacts.job(job), {"images_uint8": result.images_uint8}, notes)
    run.artifacts.forget_unfinished(job)


def result_of(
    run: Run, job: SynthesisJob, statistics: Statistics, on_check: Callable[[dict[str, float]], None]
) -> JobResult | None:
    """Optimize one job; once more in float32 if its numbers went bad in less; `None` if they are bad in that too."""
    initial = initial_images(run, job).to(run.accelerator.device)
    for precision in dict.fromkeys((run.precision, "float32")):
        checkpoint = Checkpoint(run.artifacts.checkpoint(job, precision), run.checkpoint_s)
        try:
            return optimize(
                job,
                run.recipe.synthesis,
                initial,
                run.teachers(run.recipe.teachers.synthesis_names),
                verifier=run.verifier,
                on_check=on_check,
                checkpoint=checkpoint,
                precision=precision,
                statistics=statistics,
            )
        except NotFiniteError as error:
            again = "; once more in float32" if precision != "float32" else "; the job is marked as failed"
            run.warn(f"{precision}: {error}{again}")
            state = checkpoint.load()
            assert state is not None
            if precision == "float32":
                notes = {"job": job.id, "reason": str(error), "precision": precision, "state": dict(state.notes)}
                write_tensors(run.artifacts.failed(job), state.tensors, notes)
            checkpoint.clear()
    return None


def initial_images(run: Run, job: SynthesisJob) -> Tensor:
    """What a job starts from, (B, C, S, S) in the reference normalization."""
    data, synthesis = run.recipe.data, run.recipe.synthesis
    if synthesis.init == "noise":
        generator = torch.Generator().manual_seed(job.seed + 1)
        return noise((len(job.classes), data.channels, data.size, data.size), generator)
    rows = [c * synthesis.ipc + s for c, s in zip(job.classes, job.slots, strict=True)]
    if synthesis.init in SCORED:
        return to_reference(open_rows(run.artifacts.start.path)[rows])
    chosen = real_rows(run.data, synthesis.ipc, seed=run.recipe.seed, by_index=synthesis.init == "real_index")
    return to_reference(run.data.train.images(chosen[rows]))
