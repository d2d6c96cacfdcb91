"""provenance.json: what a dataset was made from and with, and whether its files and tables are still those."""

import importlib.metadata
import os
import platform
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
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
    license: str | None = Field(default=None, validation_alias=AliasChoices(*LICENSE_KEYS))
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
    """

    FILE: ClassVar[str] = "provenance.json"

    format_version: int
    recipe: str  # its name
    images: str = DISTILLED  # or `random_real`
    partial: Partial | None = None
    recipe_fingerprint: str | None = None
    seed: int | None = None
    student_seeds: list[int] = []
    source: Source | None = None
    teachers: list[TeacherEntry]
    versions: dict[str, str] = {}
    hardware: dict[str, object] = {}
    files: dict[str, FileEntry]  # by path in the folder: all but this one, the card and its pictures

    @property
    def title(self) -> str:
        """What a repo with this file holds a version of."""
        return self.recipe if self.images == DISTILLED else f"{self.recipe} (random real images)"


def read_provenance(path: Path) -> Provenance:
    """What a dataset says of itself; a `DataError` if the file is missing, or not what prism-hf packaged."""
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
        source=Source(id=data.source, on_hub=source_on_hub, revision=source_revision, license=data.license),
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
    """Files that provenance.json vouches for: all but itself, the card, its pictures and hidden files."""
    own = (Provenance.FILE, "README.md", "assets")
    files = ((path, path.relative_to(folder).parts) for path in files_below(folder))
    return [path for path, parts in files if parts[0] not in own and not any(name.startswith(".") for name in parts)]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


@dataclass(frozen=True)
class Verification:
    """How many files were compared, the rows of each config, and the differences from what was packaged, one line each."""

    files: int
    rows: Mapping[str, int]
    differences: tuple[str, ...]


def check_folder(folder: Path) -> Verification:
    """Compare a dataset folder with its provenance.json and its card; downloads check sizes only."""
    try:
        if _leads_out(folder, Provenance.FILE):
            raise ValueError(f"{Provenance.FILE}: a link that leads out of the folder")
        provenance = Provenance.read(folder / Provenance.FILE, Provenance.FILE)
        version, files = provenance.format_version, provenance.files
        if version != FORMAT_VERSION:
            raise ValueError(f"{Provenance.FILE}: format version {version}, but this program knows {FORMAT_VERSION}")
    except ValueError as error:
        return Verification(0, {}, (str(error),))
    strange = {name: reason for name in files if (reason := _strange(folder, name))}
    tables = {name: _footer(folder / name) for name in files if name.endswith(".parquet") and name not in strange}
    rows = {
        config: sum(footer.num_rows for name, footer in tables.items() if footer and name.startswith(f"{sub}/"))
        for config, sub in TABLES.items()
    }
    listed = [strange.get(name) or _difference(folder, name, entry, tables.get(name)) for name, entry in files.items()]
    differences = (*filter(None, listed), *_unlisted(folder, files), *_card_differences(folder, tables, rows))
    return Verification(len(files), rows, differences)


def _leads_out(folder: Path, name: str) -> bool:
    return not is_inside(folder / name, homes_of(folder))


def _strange(folder: Path, name: str) -> str | None:
    """Why a file that provenance.json names is not opened, if it is not."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return f"{name[:80]!r}: provenance.json names a file outside the folder"
    own = name in ("README.md", Provenance.FILE)
    if own or not is_plain_path(name) or any(part.startswith(".") for part in pure.parts):
        return f"{name[:80]!r}: provenance.json names a file that is no part of a dataset"
    return f"{name}: a link that leads out of the folder" if _leads_out(folder, name) else None


def _footer(path: Path) -> pq.FileMetaData | None:
    """Row count and columns of a table; `None` if it is not readable Parquet."""
    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return None


def _difference(folder: Path, name: str, entry: FileEntry, footer: pq.FileMetaData | None) -> str | None:
    path = folder / name
    if not _SHA256.fullmatch(entry.sha256):
        return f"{name}: provenance.json holds no SHA-256 for it"
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != entry.bytes:
        return f"{name}: {path.stat().st_size} bytes, expected {entry.bytes}"
    if sha256_of(path) != entry.sha256:
        return f"{name}: other content than packaged (SHA-256 differs)"
    if path.suffix == ".parquet" and footer is None:
        return f"{name}: no readable Parquet"
    if footer and entry.rows not in (None, footer.num_rows):
        return f"{name}: {footer.num_rows} rows, expected {entry.rows}"
    return None


def _unlisted(folder: Path, files: Collection[str]) -> list[str]:
    """Files that `datasets` would read along with the tables."""
    paths = (path for sub in TABLES.values() for path in sorted((folder / sub).glob("train-*")))
    unlisted = (name for path in paths if (name := path.relative_to(folder).as_posix()) not in files)
    return [f"{name!r}: provenance.json does not list it, and it would be mixed in" for name in unlisted]


def _card_differences(folder: Path, tables: Mapping[str, pq.FileMetaData | None], rows: Mapping[str, int]) -> Iterator[str]:
    """What `datasets` goes by: where the card's configs point to, their rows and columns; and whole epochs of views."""
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
        yield f"README.md: no readable `configs` and `dataset_info` ({type(error).__name__})"
        return
    kinds = {name: datasets.Features.from_arrow_schema(f.schema.to_arrow_schema()) for name, f in tables.items() if f}
    for config, sub in TABLES.items():
        count, features = stated[config]
        if paths.get(config) != [{"split": "train", "path": f"{sub}/train-*"}]:
            yield f"README.md: config {config!r} is missing, or does not point to {sub}/train-*"
        if count != rows[config]:
            yield f"README.md: config {config!r} is said to have {count} rows, the tables have {rows[config]}"
        for name in (name for name, kind in kinds.items() if name.startswith(f"{sub}/") and kind != features):
            yield f"README.md: config {config!r} is said to have other columns or types than {name}"
    if not rows["default"] or rows[VIEWS] % rows["default"]:
        yield f"{rows[VIEWS]} views of {rows['default']} images; expected whole epochs"


def verify(source: str | Path, *, revision: str | None = None) -> Verification:
    """Check a dataset folder, or download a Hub dataset afresh and check that.

    Raises:
        HubError: It is neither a folder nor a Hub id, or cannot be downloaded.
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
    """Bring a dataset into a folder; what is not there as the Hub lists it, one line each."""
    api = HfApi()
    commit = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
    api.snapshot_download(repo_id, repo_type="dataset", revision=commit, local_dir=folder)
    # Card and pictures are not in provenance.json; the Hub's own list has the hashes of all files.
    report = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=commit, local_dir=folder)
    wrong = [f"{item['path']}: other content than the Hub lists" for item in report.mismatches]
    return [*wrong, *(f"{path}: not downloaded" for path in report.missing_paths)]
