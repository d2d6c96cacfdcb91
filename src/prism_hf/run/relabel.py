"""The stage relabel: encode and label the images, then draw and label their views, and write both to the final shards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..dataset import (
    DISTILLED,
    IMAGES,
    RANDOM_REAL,
    VIEWS,
    Columns,
    ImageRows,
    Shard,
    image_tables,
    view_tables,
    whole_groups,
    write_parquet,
)
from ..errors import DataError, StageError
from ..evaluation import LABELS
from ..images import decode, encode, to_reference
from ..method import ask_teachers, drawn_batches, real_rows, relabel_batches
from ..models import Teacher, folded
from ..recipe import SynthesisJob, batch_ranges, plan_jobs
from ..runtime import Progress, open_rows, raise_if_stopped, read_proof, read_row, told_in_one_line, unfinished, write_rows
from .artifacts import ImageSet, ShardTask, job_file, read_failed
from .context import Run

T = TypeVar("T")


def relabel(run: Run) -> None:
    """Label the distilled images and their views, and those of the random real control."""
    label(run, image_sets(run))


def label(run: Run, sets: Sequence[ImageSet]) -> None:
    """Write all missing shards of the given sets, divided over the processes.

    The labels are those of the decoded images, so they match the published images even in a lossy format.
    """

    def decode_once(_: object) -> None:
        if run.accelerator.is_main_process:
            for images in sets:
                decoded_images(run, images)
        run.accelerator.wait_for_everyone()

    files = run.artifacts
    _share(run, files.shard_tasks(sets, IMAGES), _image_rows, unit="image shard", steps="image")
    _share(
        run, files.shard_tasks(sets, VIEWS), _view_rows, unit="view shard", steps="epoch", prepare=decode_once, parted=True
    )


def _share(
    run: Run,
    tasks: Sequence[ShardTask],
    rows: Callable[[Run, ImageSet, Shard, Progress], Iterator[pa.Table]],
    **options: Any,
) -> None:
    def write(task: ShardTask, progress: Progress) -> None:
        images, _, shard = task
        run.artifacts.shard(*task).write(lambda draft: write_parquet(draft, rows(run, images, shard, progress)))

    run.share(
        "relabel",
        tasks,
        is_done=lambda task: run.artifacts.shard(*task).is_whole(),
        do=write,
        name=lambda task: f"{LABELS[task[0].name]}, {task[2].name}",
        size=lambda task: len(task[2].rows),
        **options,
    )


def image_sets(run: Run) -> list[ImageSet]:
    """Return the distilled images, and random real ones if a control is wanted and possible."""
    jobs = _finished_jobs(run)
    origins = sorted((c, s, job.id, i) for job in jobs for i, (c, s) in enumerate(zip(job.classes, job.slots, strict=True)))
    hashes = {job.id: read_proof(job_file(run.work, job.id)).sha256 for job in jobs}
    sets = [ImageSet(DISTILLED, tuple(origins), run.artifacts.images_key(hashes))]
    return [*sets, *control_set(run, jobs)] if run.wants_control else sets


def control_set(run: Run, jobs: Sequence[SynthesisJob]) -> list[ImageSet]:
    """Return random real images with the classes and slots of the jobs; an empty list if a class has too few."""
    ipc = run.recipe.synthesis.ipc
    try:
        rows = real_rows(run.data, ipc, seed=run.recipe.seed)
    except DataError as error:
        # Only possible with init noise: otherwise, the checks before the run have already raised this error.
        run.say(f"no random-real control: {error}")
        return []
    pairs = sorted((c, s) for job in jobs for c, s in zip(job.classes, job.slots, strict=True))
    origins = tuple((c, s, -1, int(rows[c * ipc + s])) for c, s in pairs)
    return [ImageSet(RANDOM_REAL, origins, run.artifacts.images_key([row for *_, row in origins]))]


def _finished_jobs(run: Run) -> list[SynthesisJob]:
    """Return the jobs whose images exist. That must be all jobs, unless a partial dataset is allowed."""
    jobs = plan_jobs(run.recipe)
    missing = {job.id for job in unfinished(run.accelerator, jobs, lambda job: run.artifacts.job(job).is_whole())}
    failed = {note["job"] for note in read_failed(run.work)} if run.allow_partial else set()
    if missing - failed or len(missing) == len(jobs):
        raise StageError(f"{len(missing)} of {len(jobs)} synthesis jobs are not finished; run --stage synthesize first")
    return [job for job in jobs if job.id not in missing]


def _image_rows(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[pa.Table]:
    return image_tables(_labeled(run, images, shard, progress), shard.rows.start, run.recipe, run.data.class_names)


def _labeled(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[ImageRows]:
    """Encode images, and label the decoded ones, in the batches of the recipe."""
    settings, rule, channels = run.recipe.relabel, run.recipe.packaging, run.recipe.data.channels
    teachers = _teachers(run)
    with ThreadPoolExecutor() as pool:
        for batch in batch_ranges(len(images), settings.batch_size):
            if batch.start not in shard.rows:
                continue
            raise_if_stopped()
            origins = images.origins[batch.start : batch.stop]
            pixels = [
                read_row(job_file(run.work, job), "images_uint8", row) if job >= 0 else run.data.train.images([row])[0]
                for _, _, job, row in origins
            ]
            encoded = list(pool.map(lambda image: encode(image, rule.image_format, jpeg_quality=rule.jpeg_quality), pixels))
            decoded = torch.stack(list(pool.map(lambda data: decode(data, channels), encoded)))
            with _enough_memory(run, len(batch)):
                logits = ask_teachers(to_reference(decoded.to(run.accelerator.device)), teachers, settings)
            labels, slots, jobs = torch.tensor([origin[:3] for origin in origins]).unbind(1)
            yield ImageRows(encoded, labels, slots, jobs, logits)
            progress.advance(len(batch))


def decoded_images(run: Run, images: ImageSet) -> Tensor:
    """Return the published images of a set, (N, C, S, S) uint8, memory-mapped; decode them from the shards if needed."""
    pixels, data = run.artifacts.pixels(images), run.recipe.data
    if not pixels.is_whole():
        shape = (len(images), data.channels, data.size, data.size)
        write_rows(pixels, (part.numpy() for part in _decoded(run, images)), shape, "uint8")
    return open_rows(pixels.path)


def _decoded(run: Run, images: ImageSet) -> Iterator[Tensor]:
    with ThreadPoolExecutor() as pool:
        for task in run.artifacts.shard_tasks([images], IMAGES):
            file = pq.ParquetFile(run.artifacts.shard(*task).path)
            for batch in file.iter_batches(batch_size=64, columns=["image.bytes"]):
                raise_if_stopped()
                encoded = batch.column("image").field("bytes").to_pylist()
                yield torch.stack(list(pool.map(lambda data: decode(data, run.recipe.data.channels), encoded)))


def _view_rows(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[pa.Table]:
    return whole_groups(_epochs(run, images, shard, progress))


def _epochs(run: Run, images: ImageSet, shard: Shard, progress: Progress) -> Iterator[pa.Table]:
    pixels, seed = open_rows(run.artifacts.pixels(images).path), run.recipe.seed
    settings = run.recipe.relabel if images.name == DISTILLED else run.recipe.relabel.for_real_images
    stored, size = run.recipe.stored_labels, run.recipe.data.size
    teachers = [] if stored.codec == "seed" else _teachers(run)
    for epoch in shard.rows:
        with _enough_memory(run, settings.batch_size):
            batches: Iterator[Columns]
            if stored.codec == "seed":
                batches = (columns for columns, *_ in drawn_batches(epoch, len(images), size, settings, seed=seed))
            else:
                batches = relabel_batches(epoch, pixels, teachers, settings, seed=seed)
            yield from view_tables(_until_stopped(batches), stored, run.recipe.data.num_classes)
        progress.advance()


def _teachers(run: Run) -> list[Teacher]:
    """Return the teachers that give labels, prepared for inference."""
    with _enough_memory(run, run.recipe.relabel.batch_size):
        return [folded(teacher) for teacher in run.teachers(run.recipe.relabel.teachers).values()]


def _until_stopped(batches: Iterable[T]) -> Iterator[T]:
    for batch in batches:
        raise_if_stopped()
        yield batch


def _enough_memory(run: Run, count: int) -> AbstractContextManager[None]:
    return told_in_one_line(
        f"relabel: a batch of {count} images and teachers {', '.join(run.recipe.relabel.teachers)}",
        "Lower relabel.batch_size in the recipe (it is part of the method), or use a device with more memory",
    )
