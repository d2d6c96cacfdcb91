"""What the stages of a run leave for each other in DIR/work: the name of each file, and the key of what it is made from.

start.npy                          start images that a teacher has chosen, (N, C, H, W) uint8
jobs/job-N.safetensors             the images of one synthesis job, (B, C, H, W) uint8
jobs/job-N.checkpoint.safetensors  a job that is not finished
jobs/job-N.failed.safetensors      a job whose numbers went bad, as it was then
SET/data/, SET/views/              the shards of both tables, as they ship
SET/pixels.npy                     the images decoded, (N, C, H, W) uint8: what the teachers label
students/                          scores
squeezed.json, times.json          for `prism-hf status`

SET is `distilled` or `random_real`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..dataset import IMAGES, VIEWS, Shard, image_shards, view_shards
from ..errors import DamagedError
from ..method import Precision
from ..recipe import Recipe, SynthesisJob
from ..runtime import Artifact, digest, is_finished, read_proof

STATE = 2
"""Format of a job's state in its checkpoint; one of another format is not used."""
SQUEEZED, TIMES = "squeezed.json", "times.json"


@dataclass(frozen=True)
class ImageSet:
    """A set of images to label and package: the distilled ones, or random real ones as their control.

    `origins` are (class, slot, job, row) of each image, in the order of the table. The row is one of the job's file; of a
    real image, whose job is -1, one of the training split.
    """

    name: str  # `distilled` or `random_real`
    origins: tuple[tuple[int, int, int, int], ...]
    key: str  # digest of what the images are made from

    def __len__(self) -> int:
        return len(self.origins)


ShardTask = tuple[ImageSet, str, Shard]
"""A set, its table (`data` or `views`), and a shard of that."""


@dataclass(frozen=True, eq=False)
class Artifacts:
    """Names and keys of the files of one run."""

    folder: Path  # DIR/work
    recipe: Recipe
    train_content: str  # digest of the training data
    class_names: Sequence[str]
    weights: Mapping[str, str]  # SHA-256 of the weights of every teacher

    def _key(self, what: str, sections: Sequence[str], teachers: Sequence[str], *parts: object) -> str:
        weights = {name: self.weights[name] for name in teachers}
        return digest([what, self.recipe.fingerprint(*sections), self.train_content, weights, *parts])[:16]

    @property
    def start(self) -> Artifact:
        """Start images that the logit teacher has chosen."""
        synthesis = self.recipe.synthesis
        mosaic = None if synthesis.mosaic is None else dataclasses.asdict(synthesis.mosaic)
        rule = [synthesis.init, synthesis.ipc, mosaic, synthesis.easiest]
        key = self._key("start", ("data", "squeeze"), (self.recipe.teachers.logit,), *rule)
        return Artifact(self.folder / "start.npy", key)

    @property
    def _synthesis_key(self) -> str:
        names = self.recipe.teachers.synthesis_names
        return self._key("synthesis", ("method", "data", "teachers", "squeeze", "synthesis"), names)

    def job(self, job: SynthesisJob) -> Artifact:
        """The images of a finished job."""
        return Artifact(job_file(self.folder, job.id), f"{self._synthesis_key}/{job.id}")

    def checkpoint(self, job: SynthesisJob, precision: Precision) -> Artifact:
        """The state of a job that is not finished; a job of another precision does not start from it."""
        kind = "checkpoint" if precision == "float32" else f"checkpoint.{precision}"
        return Artifact(job_file(self.folder, job.id, kind), f"{self._synthesis_key}/{job.id}/{precision}/{STATE}")

    def failed(self, job: SynthesisJob) -> Artifact:
        """The state of a job whose numbers went bad."""
        return Artifact(job_file(self.folder, job.id, "failed"), f"{self._synthesis_key}/{job.id}")

    def forget_unfinished(self, job: SynthesisJob) -> None:
        """Remove what a job needed while it was not finished."""
        for precision in get_args(Precision):
            self.checkpoint(job, precision).remove()
        self.failed(job).remove()

    def images_key(self, content: object) -> str:
        """What the images of a set are made from; `content` is the hash of each job, or the rows of the training split."""
        rule = self.recipe.packaging
        return self._key("images", ("data",), (), [rule.image_format, rule.jpeg_quality], content)

    def pixels(self, images: ImageSet) -> Artifact:
        """The decoded images."""
        return Artifact(self.folder / images.name / "pixels.npy", images.key)

    def shard_tasks(self, sets: Sequence[ImageSet], table: str) -> list[ShardTask]:
        """Every shard of one table of some sets."""
        shards_of = image_shards if table == IMAGES else view_shards
        return [(images, table, shard) for images in sets for shard in shards_of(self.recipe, len(images))]

    def shards(self, sets: Sequence[ImageSet]) -> list[Artifact]:
        """The files of both tables of some sets."""
        return [self.shard(*task) for table in (IMAGES, VIEWS) for task in self.shard_tasks(sets, table)]

    def shard(self, images: ImageSet, table: str, shard: Shard) -> Artifact:
        """The file of a shard."""
        parts = [table, shard.name, shard.rows.start, shard.rows.stop]
        # The table of images shows the names of the classes.
        names = [list(self.class_names)] if table == IMAGES else []
        key = self._key("labels", ("relabel",), self.recipe.relabel.teachers, images.key, parts, *names)
        return Artifact(self.folder / images.name / table / shard.name, key)


def job_file(folder: Path, job: int, kind: str = "") -> Path:
    """Where in DIR/work the images of a job are; or its state, of the kind `checkpoint` or `failed`."""
    suffix = f".{kind}" if kind else ""
    return folder / "jobs" / f"job-{job:05d}{suffix}.safetensors"


def read_failed(folder: Path) -> list[dict[str, Any]]:
    """What is known of the jobs of DIR/work that failed, in order; one that was finished after all is not among them."""
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
