"""Files that the stages of a run exchange in DIR/work. Each has a name, and a key that identifies what it was made from.

start.npy                          start images chosen by a teacher, (N, C, H, W) uint8
jobs/job-N.safetensors             images of one synthesis job, (B, C, H, W) uint8, and its loss history, (n,) float64 each
jobs/job-N.checkpoint.safetensors  state of an unfinished job
jobs/job-N.failed.safetensors      state of a failed job, at the step where a value was NaN or infinite
SET/data/, SET/views/              shards of both tables, exactly as they are published
SET/pixels.npy                     decoded images, (N, C, H, W) uint8, which the teachers label
students/                          scores
squeezed.json, times.json          for `prism-hf status`

SET is `distilled` or `random_real`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ..dataset import IMAGES, VIEWS, Shard, image_shards, view_shards
from ..errors import DamagedError
from ..method import Precision
from ..recipe import Recipe, SynthesisJob
from ..runtime import Artifact, digest, is_finished, read_proof

STATE = 2
"""Format version of a job's state in its checkpoint. A checkpoint with another version is not used."""
SQUEEZED, TIMES = "squeezed.json", "times.json"


@dataclass(frozen=True)
class ImageSet:
    """A set of images to label and package: the distilled images, or random real images as their control.

    `origins` has one (class, slot, job, row) per image, in table order. `row` is the row in the job's file. For a real
    image, `job` is -1 and `row` is the row in the training split.
    """

    name: str  # `distilled` or `random_real`
    origins: tuple[tuple[int, int, int, int], ...]
    key: str  # digest of the inputs that the images are made from

    def __len__(self) -> int:
        return len(self.origins)


ShardTask = tuple[ImageSet, str, Shard]
"""An image set, the name of one of its tables (`data` or `views`), and a shard of that table."""


@dataclass(frozen=True, eq=False)
class Artifacts:
    """Paths and keys of the files of one run."""

    folder: Path  # DIR/work
    recipe: Recipe
    train_content: str  # digest of the training data
    class_names: Sequence[str]
    weights: Mapping[str, str]  # SHA-256 of each teacher's weights
    _fingerprints: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def _key(self, kind: str, sections: Sequence[str], teachers: Sequence[str], *parts: object) -> str:
        weights, known = {name: self.weights[name] for name in teachers}, self._fingerprints
        if (named := tuple(sections)) not in known:  # a run has thousands of keys and few fingerprints
            known[named] = self.recipe.fingerprint(*named)
        return digest([kind, known[named], self.train_content, weights, *parts])[:16]

    @property
    def start(self) -> Artifact:
        """The start images that the logit teacher has chosen."""
        synthesis = self.recipe.synthesis
        mosaic = None if synthesis.mosaic is None else dataclasses.asdict(synthesis.mosaic)
        settings = [synthesis.init, synthesis.ipc, mosaic, synthesis.easiest]
        key = self._key("start", ("data", "squeeze"), (self.recipe.teachers.logit,), *settings)
        return Artifact(self.folder / "start.npy", key)

    @cached_property
    def _synthesis_key(self) -> str:
        names = self.recipe.teachers.synthesis_names
        return self._key("synthesis", ("method", "data", "teachers", "squeeze", "synthesis"), names)

    def job(self, job: SynthesisJob) -> Artifact:
        """Return the file with the images of a finished job."""
        return Artifact(job_file(self.folder, job.id), f"{self._synthesis_key}/{job.id}")

    def checkpoint(self, job: SynthesisJob, precision: Precision) -> Artifact:
        """Return the file with the state of an unfinished job. Each precision has a separate file."""
        kind = "checkpoint" if precision == "float32" else f"checkpoint.{precision}"
        return Artifact(job_file(self.folder, job.id, kind), f"{self._synthesis_key}/{job.id}/{precision}/{STATE}")

    def failed(self, job: SynthesisJob) -> Artifact:
        """Return the file with the state of a failed job, whose values became NaN or infinite."""
        return Artifact(job_file(self.folder, job.id, "failed"), f"{self._synthesis_key}/{job.id}")

    def forget_unfinished(self, job: SynthesisJob) -> None:
        """Remove the checkpoints and the failure state of a job that is now finished."""
        for precision in get_args(Precision):
            self.checkpoint(job, precision).remove()
        self.failed(job).remove()

    def images_key(self, content: object) -> str:
        """Return the key of the images of a set. `content` is the hash of each job, or the rows of the training split."""
        packaging = self.recipe.packaging
        return self._key("images", ("data",), (), [packaging.image_format, packaging.jpeg_quality], content)

    def pixels(self, images: ImageSet) -> Artifact:
        """Return the file with the decoded images of a set."""
        return Artifact(self.folder / images.name / "pixels.npy", images.key)

    def shard_tasks(self, sets: Sequence[ImageSet], table: str) -> list[ShardTask]:
        """Return all shards of one table, for all given sets."""
        shards_of = image_shards if table == IMAGES else view_shards
        return [(images, table, shard) for images in sets for shard in shards_of(self.recipe, len(images))]

    def shards(self, sets: Sequence[ImageSet]) -> list[Artifact]:
        """Return the files of all shards of both tables, for all given sets."""
        return [self.shard(*task) for table in (IMAGES, VIEWS) for task in self.shard_tasks(sets, table)]

    def shard(self, images: ImageSet, table: str, shard: Shard) -> Artifact:
        """Return the file of a shard."""
        parts = [table, shard.name, shard.rows.start, shard.rows.stop]
        # The image table contains the class names, so its key depends on them.
        more: list[object] = [list(self.class_names)] if table == IMAGES else []
        if table == VIEWS and self.recipe.relabel.codec == "topk":
            more = [self.recipe.evaluation.temperature]
        key = self._key("labels", ("relabel",), self.recipe.relabel.teachers, images.key, parts, *more)
        return Artifact(self.folder / images.name / table / shard.name, key)


def job_file(folder: Path, job: int, kind: str = "") -> Path:
    """Return the path of a job's images in DIR/work, or of its state if `kind` is `checkpoint` or `failed`."""
    suffix = f".{kind}" if kind else ""
    return folder / f"jobs/job-{job:05d}{suffix}.safetensors"


def read_failed(folder: Path) -> list[dict[str, Any]]:
    """Return the notes on the failed jobs in DIR/work, in order. Jobs that a later launch finished are omitted."""
    notes = []
    for path in sorted((folder / "jobs").glob("job-*.failed.safetensors")):
        name = path.name.removesuffix(".failed.safetensors")
        if not is_finished(path) or is_finished(path.with_name(f"{name}.safetensors")):
            continue
        try:
            notes.append(dict(read_proof(path).notes))
        except DamagedError as error:
            notes.append({"job": int(name.removeprefix("job-")), "reason": str(error)})
    return notes
