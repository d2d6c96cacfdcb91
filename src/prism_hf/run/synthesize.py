"""The stage synthesize: optimize each job that is not finished, from its checkpoint if it has one, or mark it as failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFiniteError, SynthesisError
from ..hub import grid
from ..images import noise, to_reference
from ..method import SCORED, choose_start_images, real_rows
from ..recipe import SynthesisJob, plan_jobs
from ..runtime.checkpoint import Checkpoint
from ..runtime.share import Progress
from ..runtime.tensors import open_rows, write_rows, write_tensors
from .artifacts import read_failed
from .context import Run
from .optimize import CHECK_EVERY, JobResult, optimize
from .statistics import real_statistics
from .trackers import log_pictures


@dataclass(frozen=True, eq=False)
class Prepared:
    """What all jobs need of the real images.

    Attributes:
        rows: Row in the training split of each start image, (K * ipc,), class-major; `None` for other inits.
        statistics: Of the convolutions of every BN teacher, where the recipe matches them.
    """

    rows: np.ndarray | None
    statistics: Mapping[str, Mapping[str, Tensor]]


def synthesize(run: Run) -> None:
    """Optimize every job that is not finished; those whose numbers go bad are listed at the end.

    Raises:
        SynthesisError: Some failed, and a partial dataset was not asked for.
    """
    prepared = Prepared(None, {})

    def prepare(missing: list[SynthesisJob]) -> None:
        nonlocal prepared
        tell_what_is_left(run, missing)
        prepared = prepare_jobs(run)

    run.share(
        "synthesize",
        plan_jobs(run.recipe),
        is_done=partial(is_finished, run),
        do=lambda job, progress: one_job(run, job, prepared, progress),
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


def prepare_jobs(run: Run) -> Prepared:
    """Make what needs a pass over the real images: start images that a teacher chooses, statistics of convolutions.

    The first process makes it, the others find it.
    """
    synthesis, files = run.recipe.synthesis, run.artifacts
    rows, statistics = None, {}
    with run.accelerator.main_process_first():
        if synthesis.init in SCORED and not files.start.is_whole():
            name = run.recipe.teachers.logit
            images = choose_start_images(run.data, run.teachers([name])[name], synthesis, seed=run.recipe.seed)
            write_rows(files.start, [images.numpy()], tuple(images.shape), "uint8")
        elif synthesis.init in ("real_index", "real_random"):
            rows = real_rows(run.data, synthesis.ipc, seed=run.recipe.seed, by_index=synthesis.init == "real_index")
        if synthesis.conv is not None:
            for name, teacher in run.teachers(run.recipe.teachers.bn_candidates).items():
                root, patch = run.teachers_root, synthesis.conv.patch
                statistics[name] = real_statistics(teacher, run.data.train, root=root, patch=patch)
    return Prepared(rows, statistics)


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


def one_job(run: Run, job: SynthesisJob, prepared: Prepared, progress: Progress) -> None:
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

    result = result_of(run, job, prepared, on_check)
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
    run: Run, job: SynthesisJob, prepared: Prepared, on_check: Callable[[dict[str, float]], None]
) -> JobResult | None:
    """Optimize one job; once more in float32 if its numbers went bad in less; `None` if they are bad in that too."""
    initial = initial_images(run, job, prepared.rows).to(run.accelerator.device)
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
                statistics=prepared.statistics,
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


def initial_images(run: Run, job: SynthesisJob, chosen: np.ndarray | None) -> Tensor:
    """What a job starts from, (B, C, S, S) in the reference normalization; `chosen` are rows of the training split."""
    data, synthesis = run.recipe.data, run.recipe.synthesis
    if synthesis.init == "noise":
        generator = torch.Generator().manual_seed(job.seed + 1)
        return noise((len(job.classes), data.channels, data.size, data.size), generator)
    rows = [label * synthesis.ipc + slot for label, slot in zip(job.classes, job.slots, strict=True)]
    if chosen is None:
        return to_reference(open_rows(run.artifacts.start.path)[rows])
    return to_reference(run.data.train.images(chosen[rows]))
