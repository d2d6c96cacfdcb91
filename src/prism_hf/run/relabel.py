"""The stage relabel: encode and label the images, then draw and label their views, straight into the shards that ship."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..dataset import (
    DISTILLED,
    RANDOM_REAL,
    ImageRows,
    Shard,
    image_shards,
    image_tables,
    view_shards,
    view_tables,
    write_parquet,
)
from ..errors import DataError, StageError
from ..evaluation import LABELS
from ..images import decode, encode, to_reference
from ..method import ask_teachers, real_rows, relabel_batches
from ..recipe import SynthesisJob, batch_ranges, plan_jobs
from ..runtime import raise_if_stopped, told_in_one_line
from ..runtime.share import Progress, unfinished
from ..runtime.tensors import open_rows, read_row, write_rows
from .artifacts import ImageSet, read_failed
from .context import Run

T = TypeVar("T")
Task = tuple[ImageSet, Shard]


def relabel(run: Run) -> None:
    """Label the distilled images and their views, and those of random real images as their control.

    Raises:
        StageError: Some jobs are not finished.
    """
    label(run, image_sets(run))


def label(run: Run, sets: Sequence[ImageSet]) -> None:
    """Write every shard of some sets that is not written, shared over the processes.

    A shard of images holds the encoded images and the labels of what they decode to: a lossy format ships what it ships.
    """
    files, recipe = run.artifacts, run.recipe
    images = [(set_, shard) for set_ in sets for shard in image_shards(recipe, len(set_))]
    views = [(set_, shard) for set_ in sets for shard in view_shards(recipe, len(set_))]
    run.share(
        "relabel",
        images,
        is_done=lambda task: files.image_shard(*task).is_whole(),
        do=partial(_label_images, run),
        unit="image shard",
        name=_name,
        size=lambda task: len(task[1].rows),
        steps="image",
    )
    run.share(
        "relabel",
        views,
        is_done=lambda task: files.view_shard(*task).is_whole(),
        do=partial(_label_views, run),
        prepare=lambda _: _decode(run, sets),
        unit="view shard",
        name=_name,
        size=lambda task: len(task[1].rows),
        steps="epoch",
    )


def are_labelled(run: Run, sets: Sequence[ImageSet]) -> bool:
    """Whether every shard of some sets is written, known to every process."""
    files = run.artifacts
    shards = [
        *(files.image_shard(set_, shard) for set_ in sets for shard in image_shards(run.recipe, len(set_))),
        *(files.view_shard(set_, shard) for set_ in sets for shard in view_shards(run.recipe, len(set_))),
    ]
    return not unfinished(run.accelerator, shards, lambda shard: shard.is_whole())


# -- which images -----------------------------------------------------------------------------------------------------


def image_sets(run: Run) -> list[ImageSet]:
    """The distilled images, and random real ones where a control is wanted and can be had.

    Raises:
        StageError: Some jobs are not finished.
    """
    jobs = finished_jobs(run)
    places = sorted((c, s, job.id, i) for job in jobs for i, (c, s) in enumerate(zip(job.classes, job.slots, strict=True)))
    sets = [ImageSet(DISTILLED, tuple(places), run.artifacts.distilled_key(jobs))]
    return [*sets, *control_set(run, jobs)] if run.wants_control else sets


def control_set(run: Run, jobs: Sequence[SynthesisJob]) -> list[ImageSet]:
    """Random real images with the classes and slots of some jobs; none if a class has too few."""
    ipc = run.recipe.synthesis.ipc
    try:
        chosen = real_rows(run.data, ipc, seed=run.recipe.seed)
    except DataError as error:
        # Only with init noise: the check before the run stops every other recipe here.
        run.say(f"no random-real control: {error}")
        return []
    places = sorted((c, s) for job in jobs for c, s in zip(job.classes, job.slots, strict=True))
    origins = tuple((c, s, -1, int(chosen[c * ipc + s])) for c, s in places)
    return [ImageSet(RANDOM_REAL, origins, run.artifacts.control_key([row for *_, row in origins]))]


def finished_jobs(run: Run) -> list[SynthesisJob]:
    """Jobs whose images are there: all of them, unless a partial dataset was asked for.

    Raises:
        StageError: Some are not finished.
    """
    jobs = plan_jobs(run.recipe)
    missing = {job.id for job in unfinished(run.accelerator, jobs, lambda job: run.artifacts.job(job).is_whole())}
    failed = {note["job"] for note in read_failed(run.work)} if run.allow_partial else set()
    if missing - failed or len(missing) == len(jobs):
        raise StageError(f"{len(missing)} of {len(jobs)} synthesis jobs are not finished; run --stage synthesize first")
    return [job for job in jobs if job.id not in missing]


# -- images -----------------------------------------------------------------------------------------------------------


def _label_images(run: Run, task: Task, progress: Progress) -> None:
    """Write a shard of the table of images."""
    images, shard = task

    def fill(draft: Path) -> None:
        batches = _labelled(run, images, shard, progress)
        write_parquet(draft, image_tables(batches, shard.rows.start, run.recipe, run.data.class_names))

    run.artifacts.image_shard(images, shard).write(fill)


def _labelled(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[ImageRows]:
    """Encode images and label what they decode to, in the batches of the recipe."""
    settings, rule, channels = run.recipe.relabel, run.recipe.packaging, run.recipe.data.channels
    teachers = list(run.teachers(settings.teachers).values())
    with ThreadPoolExecutor() as pool:
        for batch in batch_ranges(len(images), settings.batch_size):
            if batch.start not in shard.rows:
                continue
            raise_if_stopped()
            origins = images.origins[batch.start : batch.stop]
            pixels = [_image(run, job, row) for _, _, job, row in origins]
            encoded = list(pool.map(lambda image: encode(image, rule.image_format, jpeg_quality=rule.jpeg_quality), pixels))
            decoded = torch.stack(list(pool.map(lambda data: decode(data, channels), encoded)))
            with _enough_memory(run, len(batch)):
                logits = ask_teachers(to_reference(decoded.to(run.accelerator.device)), teachers, settings)
            labels, slots, jobs = torch.tensor([origin[:3] for origin in origins]).unbind(1)
            yield ImageRows(encoded, labels, slots, jobs, logits)
            progress.advance(len(batch))


def _image(run: Run, job: int, row: int) -> Tensor:
    """One image, (C, S, S) uint8, from the file of a job or from the training data."""
    if job < 0:
        return run.data.train.images([row])[0]
    return read_row(run.artifacts.job_path(job), "images_uint8", row)


def _decode(run: Run, sets: Sequence[ImageSet]) -> None:
    """Decode the images of each set once, for all processes."""
    if run.accelerator.is_main_process:
        for images in sets:
            decoded_images(run, images)
    run.accelerator.wait_for_everyone()


def decoded_images(run: Run, images: ImageSet) -> Tensor:
    """The images of a set as they ship, (N, C, S, S) uint8, mapped into memory; made from the shards where they are not."""
    files, data = run.artifacts, run.recipe.data
    pixels = files.pixels(images)
    if not pixels.is_whole():
        shards = [files.image_shard(images, shard).path for shard in image_shards(run.recipe, len(images))]
        shape = (len(images), data.channels, data.size, data.size)
        write_rows(pixels, (part.numpy() for part in _decoded(shards, data.channels)), shape, "uint8")
    return open_rows(pixels.path)


def _decoded(shards: Sequence[Path], channels: int) -> Iterator[Tensor]:
    with ThreadPoolExecutor() as pool:
        for path in shards:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["image.bytes"]):
                raise_if_stopped()
                blobs = batch.column("image").field("bytes").to_pylist()
                yield torch.stack(list(pool.map(lambda data: decode(data, channels), blobs)))


# -- views ------------------------------------------------------------------------------------------------------------


def _label_views(run: Run, task: Task, progress: Progress) -> None:
    """Write a shard of the table of views."""
    images, shard = task
    run.artifacts.view_shard(images, shard).write(lambda draft: write_parquet(draft, _views(run, images, shard, progress)))


def _views(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[pa.Table]:
    settings, pixels = run.recipe.relabel, open_rows(run.artifacts.pixels(images).path)
    teachers = list(run.teachers(settings.teachers).values())
    for epoch in shard.rows:
        with _enough_memory(run, settings.batch_size):
            batches = _until_stopped(relabel_batches(epoch, pixels, teachers, settings, seed=run.recipe.seed))
            yield from view_tables(batches, run.recipe.data.num_classes)
        progress.advance()


def _until_stopped(batches: Iterable[T]) -> Iterator[T]:
    for batch in batches:
        raise_if_stopped()
        yield batch


def _enough_memory(run: Run, count: int) -> AbstractContextManager[None]:
    return told_in_one_line(
        f"relabel: a batch of {count} images and teachers {', '.join(run.recipe.relabel.teachers)}",
        "Lower relabel.batch_size in the recipe (it is part of the method), or use a device with more memory",
    )


def _name(task: Task) -> str:
    images, shard = task
    return f"{LABELS[images.name]}, {shard.name}"
