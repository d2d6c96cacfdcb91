"""The stage synthesize: optimize each unfinished job, from its checkpoint if it has one, or mark it as failed."""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFiniteError, SynthesisError
from ..hub import grid
from ..images import ImageSplit, noise, to_reference
from ..method import (
    BATCH_SIZE,
    choose_start_images,
    data_norms,
    gather_norms,
    gather_statistics,
    real_rows,
    shuffled_batches,
)
from ..models import Teacher
from ..recipe import SynthesisJob, plan_jobs
from ..runtime import (
    Artifact,
    Checkpoint,
    Progress,
    count_text,
    digest,
    is_finished,
    open_rows,
    read_proof,
    read_tensors,
    told_in_one_line,
    waited_for,
    write_rows,
    write_tensors,
)
from .artifacts import job_file, read_failed
from .context import Run, log_picture
from .optimize import CHECK_EVERY, JobResult, history_tensors, optimize, ratio_lines, ratios_in, term_ratios

log = logging.getLogger(__name__)
SEED = 0
"""Seed of the order in which statistics are gathered from the real images."""
Statistics = Mapping[str, Mapping[str, Tensor]]


def synthesize(run: Run) -> None:
    """Optimize every unfinished job. Jobs that fail raise a `SynthesisError` unless `run.allow_partial`."""
    rows: np.ndarray | None = None
    statistics: Statistics = {}
    told = False
    unfinished = {path.name.split(".")[0] for path in (run.work / "jobs").glob("job-*.*.safetensors*")}

    def first_look(ratios: Mapping[str, float]) -> None:
        nonlocal told
        for line in [] if told else ratio_lines(ratios, run.recipe.synthesis.bn_weight):
            run.say(line)
            told = True

    def prepare(missing: list[SynthesisJob]) -> None:
        nonlocal rows, statistics
        resumed = sum(run.artifacts.checkpoint(job, run.precision).path.is_file() for job in missing)
        run.say(
            f"synthesize: {count_text(resumed, 'job')} to resume from a checkpoint, {len(missing) - resumed} to start; "
            f"{run.precision}, a checkpoint every {run.checkpoint_s:g} s"
        )
        run.say(f"synthesize: {run.compile_reason}")
        rows, statistics = _prepare(run)

    run.share(
        "synthesize",
        plan_jobs(run.recipe),
        is_done=partial(_is_finished, run, unfinished),
        do=lambda job, progress: _one_job(run, job, rows, statistics, progress, first_look),
        prepare=prepare,
        unit="job",
        name=lambda job: f"job {job.id}",
        size=lambda job: job.iterations,
        cost=_network_passes,
        steps="step",
        parted=True,
    )
    _tell_failed(run)
    files = [job_file(run.work, job.id) for job in plan_jobs(run.recipe)]
    if run.accelerator.is_main_process:
        ratios = term_ratios(read_proof(path).notes for path in files if is_finished(path))
        for line in ratio_lines(ratios, run.recipe.synthesis.bn_weight):
            run.say(line)


def _network_passes(job: SynthesisJob) -> int:
    """Return the network passes of a job, counted for each image: a step may have one teacher or several."""
    # Over many iterations, other selections use each teacher equally often in every job.
    drawn = job.bn_teachers(0) if job.teachers.selection == "per_slot" else ()
    return job.iterations * len(job.classes) * len({job.teachers.logit, *drawn})


def _is_finished(run: Run, unfinished: Collection[str], job: SynthesisJob) -> bool:
    """Return whether a job is finished. `unfinished` has the names of jobs with a checkpoint or the state of a failure."""
    if not run.artifacts.job(job).is_whole():
        return False
    if job_file(run.work, job.id).stem in unfinished:
        run.artifacts.forget_unfinished(job)  # left over if a process was killed right after it finished the job
    return True


def _prepare(run: Run) -> tuple[np.ndarray | None, Statistics]:
    """Compute the results that need a pass over the real images, in the first process; the others read them.

    Returns the row in the training split of each start image, (K * ipc,), class-major, or `None` for other inits; and the
    statistics of the layers of every BN teacher that keep none: its norms if it has no batch norm, and its convolutions if
    the recipe matches them.
    """
    synthesis, files = run.recipe.synthesis, run.artifacts
    rows: np.ndarray | None = None
    statistics: dict[str, dict[str, Tensor]] = {}
    with run.accelerator.main_process_first():
        if synthesis.teacher_chooses:
            if not files.start.is_whole():
                name = run.recipe.teachers.logit
                images = choose_start_images(run.data, run.teachers([name])[name], synthesis, seed=run.recipe.seed)
                write_rows(files.start, [images.numpy()], tuple(images.shape), "uint8")
        elif synthesis.init != "noise":
            rows = real_rows(run.data, synthesis.ipc, seed=run.recipe.seed, by_index=synthesis.init == "real_index")
        for name, teacher in run.teachers(run.recipe.bn_candidates).items():
            patches: list[int | None] = [None] if data_norms(teacher.model) else []
            patches += [] if synthesis.conv is None else [synthesis.conv.patch]
            for patch in patches:
                found = real_statistics(teacher, run.data.train, root=run.teachers_root, patch=patch)
                statistics[name] = statistics.get(name, {}) | found
    return rows, statistics


def real_statistics(teacher: Teacher, split: ImageSplit, *, root: Path, patch: int | None) -> dict[str, Tensor]:
    """Return the result of `gather_statistics` (without a `patch`, `gather_norms`) for all images of a split.

    It is cached in `root / "statistics"`.

    If another process is computing the same result, wait for it, so that all get the same bits. A file that is damaged or
    was made from other inputs is set aside, logged and made again.
    """
    facts = {
        "architecture": teacher.architecture,
        "weights_sha256": teacher.weights_sha256,
        "prepared": [teacher.mean, teacher.std, teacher.size, *([] if teacher.order is None else [teacher.order])],
        "content": f"{split.content}/{split.size}/{split.channels}",
        "count": len(split),
        "image_shape": [split.channels, split.size, split.size],
        "patch": patch,
        "seed": SEED,
        "batch_size": BATCH_SIZE,
    }
    key = digest(facts)
    slug = re.sub(r"[^a-z0-9.]+", "-", teacher.architecture.lower()).strip("-.")[:80] or "unknown"
    folder = root / "statistics" / f"{slug}-{key[:12]}"
    what, file_name, gather = "norms", "norms", gather_norms
    if patch is not None:
        what, file_name, gather = "convolutions", "conv", partial(gather_statistics, patch=patch)
    file = Artifact(folder / f"{file_name}.safetensors", key)
    with waited_for(folder, f"{file.path} is being computed"):
        if not file.is_whole():
            log.info("teacher %s: gathering statistics of %s over %d real images", teacher.name, what, len(split))
            batch = f"a batch of {min(BATCH_SIZE, len(split))} real images for statistics of {what}"
            with told_in_one_line(f"teacher {teacher.name!r}: {batch}", "Use a device with more memory"):
                averages = gather(teacher, shuffled_batches(split.images, len(split), seed=SEED))
            write_tensors(file, averages, facts)
        # Copies, because the tensors are memory-mapped and would change with the file.
        return {name: value.clone() for name, value in read_tensors(file.path).items()}


def _tell_failed(run: Run) -> None:
    failed = read_failed(run.work)
    for note in failed:
        run.say(f"failed: {note['reason']}")
    numbers = ", ".join(str(note["job"]) for note in failed)
    if failed and run.allow_partial:
        run.say(f"continuing without the images of job{'' if len(failed) == 1 else 's'} {numbers} (--allow-partial)")
    elif failed:
        raise SynthesisError(
            f"{count_text(len(failed), 'job')} failed: {numbers}; the others are finished and kept. {failed[0]['reason']}. "
            "Run the same command again to retry them, or add --allow-partial to package the others"
        )


def _one_job(
    run: Run,
    job: SynthesisJob,
    rows: np.ndarray | None,
    statistics: Statistics,
    progress: Progress,
    first_look: Callable[[Mapping[str, float]], None],
) -> None:
    """Optimize one job and save its images. If it fails in a lower precision, retry it in float32.

    `first_look` is called with the ratio of each BN teacher after the first check.
    """
    initial = _initial_images(run, job, rows).to(run.accelerator.device)
    teachers = run.teachers(run.recipe.teachers.synthesis_names)
    before = progress.count  # trackers need steps that increase from job to job
    done = 0

    def on_check(entry: dict[str, float]) -> None:
        nonlocal done
        # A retry in float32 begins anew. Steps beyond one check interval were done by an earlier launch.
        new, done = max(0, int(entry["step"]) - done), max(done, int(entry["step"]))
        progress.skip(max(0, new - CHECK_EVERY))
        progress.advance(min(new, CHECK_EVERY))
        first_look(ratios_in(entry))  # later entries have none
        values = {f"synthesis/{key}": value for key, value in entry.items() if key != "step"}
        run.accelerator.log(values | {"synthesis/job": job.id}, step=before + done)

    attempt = partial(
        optimize,
        job,
        run.recipe.synthesis,
        initial,
        teachers,
        statistics=statistics,
        on_check=on_check,
        compile=run.compile,
    )
    for precision in dict.fromkeys((run.precision, "float32")):
        checkpoint = Checkpoint(run.artifacts.checkpoint(job, precision), run.checkpoint_s)
        try:
            result = attempt(verifier=run.verifier, checkpoint=checkpoint, precision=precision)
        except NotFiniteError as error:
            _give_up(run, job, checkpoint, precision, str(error))
            continue
        log_picture(run.accelerator, "synthesis/images", grid(result.images_uint8, 1), step=before + done)
        _save(run, job, result, precision)
        return


def _save(run: Run, job: SynthesisJob, result: JobResult, precision: str) -> None:
    """Save the images and the history of a finished job, and forget its checkpoints."""
    notes = {
        "job": job.id,
        "logit_top1": result.logit_top1,
        "verifier_top1": result.verifier_top1,
        "precision": precision,
        "ratios": ratios_in(result.history[0]) if result.history else {},
    }
    tensors = {"images_uint8": result.images_uint8} | history_tensors(result.history)
    write_tensors(run.artifacts.job(job), tensors, notes)
    run.artifacts.forget_unfinished(job)


def _give_up(run: Run, job: SynthesisJob, checkpoint: Checkpoint, precision: str, reason: str) -> None:
    """End an attempt whose values became NaN or infinite. If it ran in float32, mark the job as failed."""
    is_last = precision == "float32"
    run.warn(f"{precision}: {reason}; {'the job is marked as failed' if is_last else 'retrying in float32'}")
    state = checkpoint.load()
    assert state is not None
    if is_last:
        notes = {"job": job.id, "reason": reason, "precision": precision, "step": state.notes["step"]}
        tensors = {**state.tensors, **history_tensors(state.notes["history"])}
        write_tensors(run.artifacts.failed(job), tensors, notes)
    checkpoint.clear()


def _initial_images(run: Run, job: SynthesisJob, rows: np.ndarray | None) -> Tensor:
    """Return the start images of a job, (B, C, S, S), in the reference normalization. `rows` are those of `_prepare`."""
    data, synthesis = run.recipe.data, run.recipe.synthesis
    if synthesis.init == "noise":
        generator = torch.Generator().manual_seed(job.seed + 1)
        return noise((len(job.classes), data.channels, data.size, data.size), generator)
    indices = [label * synthesis.ipc + slot for label, slot in zip(job.classes, job.slots, strict=True)]
    if rows is None:
        return to_reference(open_rows(run.artifacts.start.path)[indices])
    return to_reference(run.data.train.images(rows[indices]))
