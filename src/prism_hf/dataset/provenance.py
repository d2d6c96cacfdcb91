"""provenance.json: what a dataset was made from and with, and the SHA-256 of each of its files."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq

from ..errors import DataError
from ..models import SourceFacts, Teacher
from ..recipe import Recipe
from ..runtime import Facts, files_below, sha256_of
from .format import DISTILLED, FORMAT_VERSION

PACKAGES = ("prism-hf", "torch", "timm", "transformers", "datasets", "accelerate", "numpy", "pillow", "pyarrow")


class Partial(Facts):
    """How many images of how many there are, and which synthesis jobs failed."""

    images: int
    of: int
    failed_jobs: list[int]


class Source(SourceFacts):
    """The real data; the first version did not say whether they are on the Hub."""

    on_hub: bool = False


class TeacherEntry(Facts):
    """A teacher, its roles in the recipe, and its share of right answers on the test images if it was squeezed."""

    name: str
    roles: list[str] = []
    architecture: str | None = None
    revision: str | None = None
    licence: str | None = None
    weights_sha256: str
    test_top1: float | None = None


class FileEntry(Facts):
    """A file; sets packaged before rows were recorded have the counts of their tables in the card alone."""

    sha256: str
    bytes: int
    rows: int | None = None


class Provenance(Facts):
    """provenance.json. What programs go by must be there; the rest is for people, and may be missing.

    Holds no time, host name or path: the same recipe gives the same bytes. A complete dataset has no `partial`.

    Attributes:
        recipe: Its name.
        images: `distilled`, or `random_real`.
        files: Path in the folder -> what the file must be; all but this one, the card and its pictures.
    """

    FILE: ClassVar[str] = "provenance.json"

    format_version: int
    recipe: str
    images: str = DISTILLED
    partial: Partial | None = None
    recipe_fingerprint: str | None = None
    seed: int | None = None
    student_seeds: list[int] = []
    source: Source | None = None
    teachers: list[TeacherEntry]
    versions: dict[str, str] = {}
    hardware: dict[str, object] = {}
    files: dict[str, FileEntry]

    @property
    def title(self) -> str:
        """What a repo with this file holds a version of."""
        return self.recipe if self.images == DISTILLED else f"{self.recipe} (random real images)"


def read_provenance(path: Path) -> Provenance:
    """What a dataset says of itself; a `DataError` if the file is missing, or not what prism-hf packaged."""
    try:
        return Provenance.read(path)
    except ValueError as error:
        raise DataError(f"{error}; package or download the data set again") from error


def write_provenance(
    folder: Path,
    *,
    recipe: Recipe,
    teachers: Mapping[str, Teacher],
    source_revision: str | None,
    source_on_hub: bool,
    hardware: Mapping[str, object],
    squeezed_top1: Mapping[str, float],
    images: str = DISTILLED,
    partial: Mapping[str, object] | None = None,
) -> None:
    """Write provenance.json of a dataset folder whose tables and recipe are there; see `Provenance` and `Partial`."""
    data, incomplete = recipe.data, {"partial": Partial.model_validate(dict(partial))} if partial else {}
    Provenance(
        format_version=FORMAT_VERSION,
        recipe=recipe.name,
        images=images,
        recipe_fingerprint=recipe.fingerprint(),
        seed=recipe.seed,
        student_seeds=list(recipe.evaluation.seeds),
        source=Source(id=data.source, on_hub=source_on_hub, revision=source_revision, licence=data.licence),
        teachers=[_teacher_entry(recipe, name, teacher, squeezed_top1.get(name)) for name, teacher in teachers.items()],
        versions=versions(),
        hardware=dict(hardware),
        files={path.relative_to(folder).as_posix(): _file_entry(path) for path in data_files(folder)},
        **incomplete,
    ).write(folder / Provenance.FILE)


def _teacher_entry(recipe: Recipe, name: str, teacher: Teacher, top1: float | None) -> TeacherEntry:
    roles = {
        "logit": [recipe.teachers.logit],
        "bn_pool": recipe.teachers.bn_pool,
        "relabel": recipe.relabel.teachers,
        "verifier": [recipe.teachers.verifier],
    }
    return TeacherEntry(
        name=name,
        roles=[role for role, names in roles.items() if name in names],
        architecture=teacher.architecture,
        revision=teacher.revision,
        licence=teacher.licence,
        weights_sha256=teacher.weights_sha256,
        test_top1=top1,
    )


def _file_entry(path: Path) -> FileEntry:
    rows = {"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {}
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size, **rows)


def data_files(folder: Path) -> list[Path]:
    """Files that provenance.json vouches for: all but itself, the card, its pictures and hidden files."""
    own = (Provenance.FILE, "README.md", "assets")
    files = ((path, path.relative_to(folder).parts) for path in files_below(folder))
    return [path for path, parts in files if parts[0] not in own and not any(name.startswith(".") for name in parts)]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
