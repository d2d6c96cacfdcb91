"""Whether a data set is what was packaged: every file against provenance.json, every table against its row count."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import HfApi, RepoCard

from .packaging import FORMAT_VERSION, VIEWS
from .patience import SHORT, again
from .storage import sha256_of

TABLES = {"default": "data", VIEWS: VIEWS}
"""Config -> folder of its shards."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verification:
    """What a check found.

    Attributes:
        files: Files compared with provenance.json.
        rows: Config -> rows in its tables.
        differences: One line each; empty if the data set is what was packaged.
    """

    files: int
    rows: Mapping[str, int]
    differences: tuple[str, ...]


def check_folder(folder: Path) -> Verification:
    """Compare a data set folder with its provenance.json and its card.

    Downloads check sizes only, so this is what notices a flipped bit.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        version, files = provenance["format_version"], dict(provenance["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Verification(0, {}, (f"provenance.json cannot be read ({type(error).__name__})",))
    if version != FORMAT_VERSION:
        line = f"provenance.json: format version {version}, but this program knows {FORMAT_VERSION}; use a newer one"
        return Verification(0, {}, (line,))
    listed = [difference for name, facts in files.items() for difference in _check_file(folder, name, facts)]
    extra = [
        f"{path.relative_to(folder).as_posix()}: a table that provenance.json does not list, and that would be mixed in"
        for sub in TABLES.values()
        for path in sorted((folder / sub).glob("train-*"))
        if path.relative_to(folder).as_posix() not in files
    ]
    rows = {config: _rows(folder, files, sub) for config, sub in TABLES.items()}
    return Verification(len(files), rows, (*listed, *extra, *_check_counts(folder, rows)))


def _check_file(folder: Path, name: str, facts: Any) -> Iterator[str]:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        yield f"{name!r}: provenance.json names a file outside the folder"
        return
    if not isinstance(facts, dict) or not _SHA256.fullmatch(str(facts.get("sha256"))):
        yield f"{name}: provenance.json holds no SHA-256 for it"
        return
    path = folder / name
    if not path.is_file():
        yield f"{name}: missing"
    elif path.stat().st_size != facts.get("bytes"):
        yield f"{name}: {path.stat().st_size} bytes, expected {facts.get('bytes')}"
    elif sha256_of(path) != facts["sha256"]:
        yield f"{name}: other content than packaged (SHA-256 differs)"
    elif path.suffix == ".parquet":
        yield from _check_table(path, name, facts)


def _check_table(path: Path, name: str, facts: Mapping[str, Any]) -> Iterator[str]:
    rows = _table_rows(path)
    if rows is None:
        yield f"{name}: no readable Parquet"
    elif rows != facts.get("rows", rows):  # sets packaged before rows were recorded have their counts in the card alone
        yield f"{name}: {rows} rows, expected {facts['rows']}"


def _table_rows(path: Path) -> int | None:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError):
        return None


def _rows(folder: Path, files: Mapping[str, Any], sub: str) -> int:
    names = [name for name in files if name.startswith(f"{sub}/") and name.endswith(".parquet") and ".." not in name]
    return sum(_table_rows(folder / name) or 0 for name in names)


def _check_counts(folder: Path, rows: Mapping[str, int]) -> Iterator[str]:
    """The card's row counts, which `datasets` enforces, and whole epochs of views."""
    try:
        header = RepoCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
        stated = {info["config_name"]: info["splits"][0]["num_examples"] for info in header["dataset_info"]}
        configs = {config["config_name"] for config in header["configs"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        yield f"README.md: no readable `configs` and `dataset_info` ({type(error).__name__})"
        return
    for config, count in rows.items():
        if config not in configs:
            yield f"README.md: config {config!r} is missing"
        if stated.get(config) != count:
            yield f"README.md: config {config!r} is said to have {stated.get(config)} rows, the tables have {count}"
    images, views = rows["default"], rows[VIEWS]
    if not images or views % images:
        yield f"{views} views of {images} images; expected whole epochs"


def verify(source: str | Path, *, revision: str | None = None, pauses: Sequence[float] = SHORT) -> Verification:
    """Check a data set folder, or download a Hub data set afresh and check that.

    Args:
        source: Folder, or Hub id.
        revision: Of a Hub data set.
        pauses: Seconds between tries of a download.

    Raises:
        HubError: It cannot be downloaded.
    """
    if Path(source).is_dir():
        return check_folder(Path(source))
    api, repo_id = HfApi(), str(source)
    with tempfile.TemporaryDirectory() as place:

        def fetch() -> tuple[str, ...]:
            commit = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
            api.snapshot_download(repo_id, repo_type="dataset", revision=commit, local_dir=place)
            # Card and pictures are not in provenance.json; the Hub's own list has the hashes of all files.
            report = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=commit, local_dir=place)
            wrong = [f"{item['path']}: other content than the Hub lists" for item in report.mismatches]
            return (*wrong, *(f"{path}: not downloaded" for path in report.missing_paths))

        arrived = again(fetch, f"downloading {repo_id!r}", pauses)
        found = check_folder(Path(place))
    return replace(found, differences=(*arrived, *found.differences))
