"""What the stages of a run leave for each other in DIR/work, what each file was made from, and whether it still is whole.

start.npy                          start images that a teacher has chosen, (N, C, H, W) uint8
jobs/job-N.safetensors             the images of one synthesis job, (B, C, H, W) uint8
jobs/job-N.checkpoint.safetensors  a job that is not finished
jobs/job-N.failed.safetensors      a job whose numbers went bad, as it was then
SET/encoded.bin, rows.npy          image files one after the other; class, slot, job and end of each
SET/pixels.npy                     the same images decoded, (N, C, H, W) uint8: what the teachers label
SET/teacher_logits.npy             their labels without a view, (N, K) float16
SET/epoch-N.parquet                one epoch of views with labels

Every file is sealed (see `storage`), and its seal carries a key: a digest of everything that it was made from. SET is
`distilled` or `random_real`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..dataset.writer import GROUP_BYTES, Epoch, ImageTable, view_features, view_table
from ..errors import DamagedError
from ..images.pixels import decode, encode
from ..method.objective import Precision
from ..recipe.describe import VIEW_ROW_BYTES
from ..recipe.plan import SynthesisJob
from ..recipe.schema import Recipe
from ..runtime.stop import raise_if_stopped
from ..runtime.store import digest, is_sealed, is_whole, read_seal, remove_sealed, write_sealed
from ..runtime.tensors import open_rows, read_row, write_rows, write_tensors

DISTILLED, RANDOM_REAL = "distilled", "random_real"
SETS = (DISTILLED, RANDOM_REAL)
SQUEEZED = "squeezed.json"
"""Written when all teachers are trained."""
_WINDOW = 64
"""Images that are encoded or decoded at once."""
_ROW = ("class", "slot", "job", "end")


class Work:
    """The files of one run between its stages.

    Args:
        folder: DIR/work.
        recipe: What the run does.
        inputs: What the names in the recipe stand for: digest of the training data, weights of every teacher.
    """

    def __init__(self, folder: Path, recipe: Recipe, inputs: Mapping[str, Any]) -> None:
        self.folder, self.recipe, self._inputs = folder, recipe, inputs
        self._whole: dict[Path, tuple[int, int, str]] = {}

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the weights of every teacher."""
        return dict(self._inputs["teachers"])

    def _key(self, what: str, sections: Sequence[str], teachers: Sequence[str], *parts: object) -> str:
        weights = {name: self._inputs["teachers"][name] for name in teachers}
        return digest([what, self.recipe.fingerprint(*sections), self._inputs["train"], weights, *parts])[:16]

    def is_whole(self, path: Path, key: str) -> bool:
        """See `storage.is_whole`; a file that was whole, and was not touched since, is not read again."""
        known = self._whole.get(path)
        if known is not None and is_sealed(path) and path.is_file() and known == (*_state(path), key):
            return True
        if not is_whole(path, key, otherwise="another recipe, other data, teachers or images"):
            return False
        self._whole[path] = (*_state(path), key)
        return True

    # -- synthesis jobs -----------------------------------------------------------------------------------------------

    @property
    def synthesis_key(self) -> str:
        """What every job is made from."""
        names = self.recipe.teachers.synthesis_names
        return self._key("synthesis", ("method", "data", "teachers", "squeeze", "synthesis"), names)

    @property
    def start_file(self) -> Path:
        """Where start images are that a teacher has chosen."""
        return self.folder / "start.npy"

    @property
    def start_key(self) -> str:
        """What they are made from."""
        synthesis = self.recipe.synthesis
        mosaic = None if synthesis.mosaic is None else dataclasses.asdict(synthesis.mosaic)
        rule = [synthesis.init, synthesis.ipc, mosaic, synthesis.easiest]
        return self._key("start", ("data", "squeeze"), (self.recipe.teachers.logit,), *rule)

    def job_file(self, job: SynthesisJob) -> Path:
        """Where the images of a finished job are."""
        return self.folder / "jobs" / f"job-{job.id:05d}.safetensors"

    def checkpoint_file(self, job: SynthesisJob, precision: Precision = "float32") -> Path:
        """Where a job that is not finished keeps its state; that of another precision is no start for it."""
        suffix = "" if precision == "float32" else f".{precision}"
        return self.folder / "jobs" / f"job-{job.id:05d}.checkpoint{suffix}.safetensors"

    def failed_file(self, job: SynthesisJob) -> Path:
        """Where the state of a failed job is."""
        return self.folder / "jobs" / f"job-{job.id:05d}.failed.safetensors"

    def job_is_whole(self, job: SynthesisJob) -> bool:
        """See `is_whole`."""
        return self.is_whole(self.job_file(job), f"{self.synthesis_key}/{job.id}")

    def keep_job(self, job: SynthesisJob, images_uint8: Tensor, notes: Mapping[str, object]) -> None:
        """Write a finished job."""
        key = f"{self.synthesis_key}/{job.id}"
        write_tensors(self.job_file(job), {"images_uint8": images_uint8}, {"key": key, "job": job.id, **notes})

    def forget_state(self, job: SynthesisJob) -> None:
        """Remove what a job needed while it was not finished."""
        for precision in get_args(Precision):
            remove_sealed(self.checkpoint_file(job, precision))
        remove_sealed(self.failed_file(job))

    def job_notes(self, job: SynthesisJob) -> dict[str, Any]:
        """What is known of a finished job."""
        notes = read_seal(self.job_file(job))["notes"]
        assert isinstance(notes, dict)
        return notes

    # -- sets of images -----------------------------------------------------------------------------------------------

    def set_file(self, name: str, file: str) -> Path:
        """A file of a set."""
        return self.folder / name / file

    def distilled_key(self, jobs: Sequence[SynthesisJob]) -> str:
        """What the encoded images of these finished jobs are made from."""
        seals = [read_seal(self.job_file(job))["file_sha256"] for job in jobs]
        return self._key("images", ("packaging",), (), [job.id for job in jobs], seals)

    def control_key(self, rows: Sequence[int]) -> str:
        """What the encoded images of the control are made from."""
        return self._key("images", ("packaging", "data"), (), list(rows))

    def distilled_images(self, jobs: Sequence[SynthesisJob]) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        """((class, slot, job), image) of finished jobs, class-major; one image in memory."""
        places = sorted(
            (c, s, job.id, i) for job in jobs for i, (c, s) in enumerate(zip(job.classes, job.slots, strict=True))
        )
        files = {job.id: self.job_file(job) for job in jobs}
        for label, slot, job, row in places:
            yield (label, slot, job), read_row(files[job], "images_uint8", row)

    def images_are_whole(self, name: str, key: str) -> bool:
        """Whether the encoded and the decoded images of a set are there."""
        return all([self.is_whole(self.set_file(name, f), key) for f in ("encoded.bin", "pixels.npy", "rows.npy")])

    def keep_images(self, name: str, key: str, images: Iterable[tuple[tuple[int, int, int], Tensor]], count: int) -> None:
        """Encode the images of a set, and decode what came out: a lossy format ships what it ships."""
        rule, data = self.recipe.packaging, self.recipe.data
        rows: list[tuple[int, int, int, int]] = []
        encoded = self.set_file(name, "encoded.bin")

        def write(draft: Path) -> None:
            with open(draft, "wb") as file, ThreadPoolExecutor() as pool:
                for window in _windows(images, _WINDOW):
                    raise_if_stopped()
                    blobs = pool.map(
                        lambda item: encode(item[1], rule.image_format, jpeg_quality=rule.jpeg_quality), window
                    )
                    for (place, _), blob in zip(window, blobs, strict=True):
                        file.write(blob)
                        rows.append((*place, file.tell()))

        write_sealed(encoded, write, {"key": key})
        assert len(rows) == count, (len(rows), count)
        ends = [row[3] for row in rows]
        shape = (count, data.channels, data.size, data.size)
        write_rows(self.set_file(name, "pixels.npy"), _decoded(encoded, ends, data.channels), shape, "uint8", {"key": key})
        table = np.array(rows, dtype=np.int64).reshape(count, len(_ROW))
        write_rows(self.set_file(name, "rows.npy"), [table], table.shape, "int64", {"key": key})

    def pixels(self, name: str) -> Tensor:
        """The decoded images of a set, (N, C, H, W) uint8, mapped into memory."""
        return open_rows(self.set_file(name, "pixels.npy"))

    def places(self, name: str) -> Iterator[tuple[int, int]]:
        """Class and slot of each image of a set."""
        for row in open_rows(self.set_file(name, "rows.npy")):
            yield int(row[0]), int(row[1])

    # -- labels -------------------------------------------------------------------------------------------------------

    def labels_key(self, name: str) -> str:
        """What the labels of a set are made from."""
        shown = read_seal(self.set_file(name, "pixels.npy"))["file_sha256"]
        return self._key("labels", ("relabel",), self.recipe.relabel.teachers, shown)

    def epoch_file(self, name: str, epoch: int) -> Path:
        """Where one epoch of views is."""
        return self.set_file(name, f"epoch-{epoch:05d}.parquet")

    def epoch_is_whole(self, name: str, epoch: int, key: str) -> bool:
        """See `is_whole`."""
        return self.is_whole(self.epoch_file(name, epoch), f"{key}/{epoch}")

    def keep_epoch(self, name: str, epoch: int, key: str, batches: Iterable[Epoch]) -> None:
        """Write an epoch of views as its batches come."""
        classes = self.recipe.data.num_classes

        def write(draft: Path) -> None:
            schema = view_features(classes).arrow_schema
            with pq.ParquetWriter(draft, schema, compression="none", use_dictionary=False) as writer:
                for group in _groups(batches, max(1, GROUP_BYTES // (2 * classes + VIEW_ROW_BYTES))):
                    writer.write_table(view_table(group, classes))

        write_sealed(self.epoch_file(name, epoch), write, {"key": f"{key}/{epoch}"})

    def epochs(self, name: str) -> Iterator[Iterator[pa.Table]]:
        """The views of a set: for each epoch its row groups."""
        for epoch in range(self.recipe.relabel.epochs):
            yield self._row_groups(self.epoch_file(name, epoch))

    def _row_groups(self, path: Path) -> Iterator[pa.Table]:
        schema = view_features(self.recipe.data.num_classes).arrow_schema
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                raise_if_stopped()
                # Only the columns: a table that was read names its fields by number, which would end up in the data set.
                yield pa.table(file.read_row_group(number).columns, schema=schema)

    def labels_are_whole(self, name: str, key: str) -> bool:
        """Whether the labels without a view are there."""
        return self.is_whole(self.set_file(name, "teacher_logits.npy"), key)

    def keep_labels(self, name: str, key: str, parts: Iterable[Tensor], count: int) -> None:
        """Write the labels without a view as they come."""
        arrays = (part.numpy() for part in parts)
        shape = (count, self.recipe.data.num_classes)
        write_rows(self.set_file(name, "teacher_logits.npy"), arrays, shape, "float16", {"key": key})


class StoredImages:
    """The labelled images of a set, read a few at a time.

    Args:
        work: Where they are.
        name: Of the set.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._file = work.set_file(name, "encoded.bin")
        self._rows = open_rows(work.set_file(name, "rows.npy"))
        self._logits = open_rows(work.set_file(name, "teacher_logits.npy"))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all image files."""
        return int(self._rows[-1, 3])

    def read(self, start: int, stop: int) -> ImageTable:
        """Rows `start` to `stop`."""
        raise_if_stopped()
        ends = [int(self._rows[start - 1, 3]) if start else 0, *self._rows[start:stop, 3].tolist()]
        with open(self._file, "rb") as file:
            file.seek(ends[0])
            encoded = [file.read(b - a) for a, b in itertools.pairwise(ends)]
        labels, slots, jobs = (self._rows[start:stop, column].clone() for column in range(3))
        return ImageTable(encoded, labels, slots, jobs, self._logits[start:stop].clone())


def _state(path: Path) -> tuple[int, int]:
    """Changes with the file."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while window := list(itertools.islice(source, size)):
        yield window


def _decoded(path: Path, ends: Sequence[int], channels: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file, ThreadPoolExecutor() as pool:
        for window in _windows(itertools.pairwise([0, *ends]), _WINDOW):
            raise_if_stopped()
            blobs = [file.read(b - a) for a, b in window]
            yield torch.stack(list(pool.map(lambda blob: decode(blob, channels), blobs))).numpy()


def _groups(batches: Iterable[Epoch], rows: int) -> Iterator[Epoch]:
    """Batches joined to at least this many rows."""
    held: list[Epoch] = []

    def joined() -> Epoch:
        return {key: np.concatenate([batch[key] for batch in held]) for key in held[0]}

    for batch in batches:
        raise_if_stopped()
        held.append(batch)
        if sum(len(part["epoch"]) for part in held) >= rows:
            yield joined()
            held = []
    if held:
        yield joined()


def read_failed(folder: Path) -> list[dict[str, Any]]:
    """What is known of the jobs of DIR/work that failed, in order; one that was finished after all is not among them."""
    notes = []
    for path in sorted((folder / "jobs").glob("job-*.failed.safetensors")):
        name = path.name.removesuffix(".failed.safetensors")
        if not is_sealed(path) or is_sealed(path.with_name(f"{name}.safetensors")):
            continue
        try:
            notes.append(dict(read_seal(path)["notes"]))  # type: ignore[call-overload]
        except DamagedError as error:
            notes.append({"job": int(name.removeprefix("job-")), "reason": str(error)})
    return notes
