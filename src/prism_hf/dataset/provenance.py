"""provenance.json: the inputs and tools behind a dataset, and the check that its files and tables are unchanged."""

import importlib.metadata
import os
import platform
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData, HfApi
from pydantic import AliasChoices, Field

from ..errors import DataError, HubError
from ..models import LICENSE_KEYS, SourceFacts, Teacher
from ..recipe import Recipe
from ..runtime import SHORT, Facts, again, files_below, homes_of, is_inside, is_plain_path, read_card, sha256_of
from .format import DISTILLED, FORMAT_VERSION, TABLES, VIEWS
from .tables import is_hub_id

PACKAGES = ("prism-hf", "torch", "timm", "transformers", "datasets", "accelerate", "numpy", "pillow", "pyarrow")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Partial(Facts):
    """Extent of an incomplete dataset: the images it has, how many were expected (`of`), and the failed synthesis jobs."""

    images: int
    of: int
    failed_jobs: list[int]


class Source(SourceFacts):
    """The real data and the number of its training images of each class; early versions recorded less."""

    on_hub: bool = False
    images_per_class: list[int] = []


class TeacherEntry(Facts):
    """A teacher, its roles in the recipe and, if it was trained by the squeeze stage, its test top-1 in [0, 1]."""

    name: str
    roles: list[str] = []
    architecture: str | None = None
    revision: str | None = None
    license: str | None = Field(default=None, validation_alias=AliasChoices(*LICENSE_KEYS))
    weights_sha256: str
    test_top1: float | None = None


class FileEntry(Facts):
    """One file of a dataset; datasets packaged before `rows` existed have row counts in the card only."""

    sha256: str
    bytes: int
    rows: int | None = None


class Provenance(Facts):
    """Contents of provenance.json; fields that programs rely on are required, and fields for people are optional.

    It contains no time, host name or path: the same recipe gives the same bytes. A complete dataset has no `partial`.
    """

    FILE: ClassVar[str] = "provenance.json"

    format_version: int
    recipe: str  # name of the recipe
    images: str = DISTILLED  # or `random_real`
    partial: Partial | None = None
    recipe_fingerprint: str | None = None
    seed: int | None = None
    student_seeds: list[int] = []
    source: Source | None = None
    teachers: list[TeacherEntry]
    versions: dict[str, str] = {}
    hardware: dict[str, object] = {}
    files: dict[str, FileEntry]  # by path in the folder; without this file, the card and its figures

    @property
    def title(self) -> str:
        """Name of the dataset that a repo with this file contains a version of."""
        return self.recipe if self.images == DISTILLED else f"{self.recipe} (random real images)"


def read_provenance(path: Path) -> Provenance:
    """Read a provenance.json file; raise a `DataError` if it is missing or was not written by prism-hf."""
    try:
        return Provenance.read(path)
    except ValueError as error:
        raise DataError(f"{error}; package or download the dataset again") from error


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
    images_per_class: Sequence[int] | None = None,
) -> None:
    """Write provenance.json into a dataset folder that has its tables and recipe; see `Provenance` and `Partial`."""
    data, incomplete = recipe.data, {"partial": Partial.model_validate(dict(partial))} if partial else {}
    counts = {} if images_per_class is None else {"images_per_class": list(images_per_class)}
    Provenance(
        format_version=FORMAT_VERSION,
        recipe=recipe.name,
        images=images,
        recipe_fingerprint=recipe.fingerprint(),
        seed=recipe.seed,
        student_seeds=list(recipe.evaluation.seeds),
        source=Source(id=data.source, on_hub=source_on_hub, revision=source_revision, license=data.license, **counts),
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
        license=teacher.license,
        weights_sha256=teacher.weights_sha256,
        test_top1=top1,
    )


def _file_entry(path: Path) -> FileEntry:
    rows = {"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {}
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size, **rows)


def data_files(folder: Path) -> list[Path]:
    """Return the files that provenance.json lists: all except itself, the card, its figures and hidden files."""
    own = (Provenance.FILE, "README.md", "assets")
    files = ((path, path.relative_to(folder).parts) for path in files_below(folder))
    return [path for path, parts in files if parts[0] not in own and not any(name.startswith(".") for name in parts)]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can affect results."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


@dataclass(frozen=True)
class Verification:
    """Result of a check: number of files compared, rows per config, and one line per difference from what was packaged."""

    files: int
    rows: Mapping[str, int]
    differences: tuple[str, ...]


def check_folder(folder: Path) -> Verification:
    """Compare a dataset folder with its provenance.json and its card."""
    try:
        if _leads_out(folder, Provenance.FILE):
            raise ValueError(f"{Provenance.FILE}: a link that leads out of the folder")
        provenance = Provenance.read(folder / Provenance.FILE, Provenance.FILE)
        version, files = provenance.format_version, provenance.files
        if version != FORMAT_VERSION:
            raise ValueError(f"{Provenance.FILE}: format version {version}, but this program supports {FORMAT_VERSION}")
    except ValueError as error:
        return Verification(0, {}, (str(error),))
    refused = {name: reason for name in files if (reason := _refusal(folder, name))}
    tables = {name: _footer(folder / name) for name in files if name.endswith(".parquet") and name not in refused}
    rows = {
        config: sum(footer.num_rows for name, footer in tables.items() if footer and name.startswith(f"{sub}/"))
        for config, sub in TABLES.items()
    }
    listed = [refused.get(name) or _difference(folder, name, entry, tables.get(name)) for name, entry in files.items()]
    differences = (*filter(None, listed), *_unlisted(folder, files), *_card_differences(folder, tables, rows))
    return Verification(len(files), rows, differences)


def _leads_out(folder: Path, name: str) -> bool:
    return not is_inside(folder / name, homes_of(folder))


def _refusal(folder: Path, name: str) -> str | None:
    """Return why a file named in provenance.json must not be opened, or `None` if it may be."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return f"{name[:80]!r}: provenance.json names a file outside the folder"
    own = name in ("README.md", Provenance.FILE)
    if own or not is_plain_path(name) or any(part.startswith(".") for part in pure.parts):
        return f"{name[:80]!r}: provenance.json names a file that is not part of a dataset"
    return f"{name}: a link that leads out of the folder" if _leads_out(folder, name) else None


def _footer(path: Path) -> pq.FileMetaData | None:
    """Return the row count and columns of a table, or `None` if it is not readable Parquet."""
    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return None


def _difference(folder: Path, name: str, entry: FileEntry, footer: pq.FileMetaData | None) -> str | None:
    path = folder / name
    if not _SHA256.fullmatch(entry.sha256):
        return f"{name}: provenance.json has no valid SHA-256 for it"
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != entry.bytes:
        return f"{name}: {path.stat().st_size} bytes, expected {entry.bytes}"
    if sha256_of(path) != entry.sha256:
        return f"{name}: content has changed since packaging (SHA-256 differs)"
    if path.suffix == ".parquet" and footer is None:
        return f"{name}: not readable as Parquet"
    if footer and entry.rows not in (None, footer.num_rows):
        return f"{name}: {footer.num_rows} rows, expected {entry.rows}"
    return None


def _unlisted(folder: Path, files: Collection[str]) -> list[str]:
    """Describe files missing from provenance.json that `datasets` would read as part of the tables."""
    paths = (path for sub in TABLES.values() for path in sorted((folder / sub).glob("train-*")))
    unlisted = (name for path in paths if (name := path.relative_to(folder).as_posix()) not in files)
    return [f"{name!r}: provenance.json does not list it, but it would be read with the table" for name in unlisted]


def _card_differences(folder: Path, tables: Mapping[str, pq.FileMetaData | None], rows: Mapping[str, int]) -> Iterator[str]:
    """Yield differences of paths, rows and columns between card and tables, and check that the views are whole epochs."""
    if _leads_out(folder, "README.md"):
        yield "README.md: a link that leads out of the folder"
        return
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = read_card(text)
        infos = DatasetInfosDict.from_dataset_card_data(DatasetCardData(**header))
        stated = {name: (infos[name].splits["train"].num_examples, infos[name].features) for name in TABLES}
        paths = {config["config_name"]: config["data_files"] for config in header["configs"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"README.md: `configs` or `dataset_info` is missing or unreadable ({type(error).__name__})"
        return
    kinds = {name: datasets.Features.from_arrow_schema(f.schema.to_arrow_schema()) for name, f in tables.items() if f}
    for config, sub in TABLES.items():
        count, features = stated[config]
        if paths.get(config) != [{"split": "train", "path": f"{sub}/train-*"}]:
            yield f"README.md: config {config!r} is missing, or does not point to {sub}/train-*"
        if count != rows[config]:
            yield f"README.md: config {config!r} states {count} rows, but the table has {rows[config]}"
        for name in (name for name, kind in kinds.items() if name.startswith(f"{sub}/") and kind != features):
            yield f"README.md: config {config!r} states columns or types that differ from {name}"
    if not rows["default"] or rows[VIEWS] % rows["default"]:
        yield f"{rows[VIEWS]} views for {rows['default']} images; expected whole epochs"


def verify(source: str | Path, *, revision: str | None = None) -> Verification:
    """Check a dataset folder, or a fresh download of a Hub dataset.

    Raises:
        HubError: The source is neither a folder nor a Hub id, or the dataset cannot be downloaded.
    """
    if os.path.isdir(source):
        return check_folder(Path(source))
    repo_id = str(source)
    if not is_hub_id(repo_id):
        raise HubError(f"{repo_id!r} is neither a folder here nor a Hub id (org/name); give one of the two")
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # not /tmp, which may be memory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        missing = again(lambda: _download(repo_id, revision, folder), f"downloading dataset {repo_id!r}", SHORT)
        checked = check_folder(Path(folder))
    return replace(checked, differences=(*missing, *checked.differences))


def _download(repo_id: str, revision: str | None, folder: str) -> list[str]:
    """Download a dataset into a folder; return one line for each file that differs from the Hub's list or is missing."""
    api = HfApi()
    commit = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
    api.snapshot_download(repo_id, repo_type="dataset", revision=commit, local_dir=folder)
    # A download checks sizes only. Card and figures are not in provenance.json, but the Hub lists the hashes of all files.
    report = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=commit, local_dir=folder)
    wrong = [f"{item['path']}: content differs from the hash that the Hub lists" for item in report.mismatches]
    return [*wrong, *(f"{path}: not downloaded" for path in report.missing_paths)]
