"""Whether a data set is what was packaged: every file against provenance.json, every table against its row count."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import HubError
from ..runtime.hub_client import SHORT, again
from ..runtime.store import sha256_of
from ..runtime.untrusted import homes_of, is_inside, is_plain_path, read_card
from .writer import FORMAT_VERSION, VIEWS

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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return Verification(0, {}, (f"provenance.json cannot be read ({type(error).__name__})",))
    if version != FORMAT_VERSION:
        line = f"provenance.json: format version {version!r}, but this program knows {FORMAT_VERSION}"
        return Verification(0, {}, (line,))
    if not is_inside(folder / "provenance.json", homes_of(folder)):
        return Verification(0, {}, ("provenance.json: a link that leads out of the folder",))
    listed = [difference for name, facts in files.items() for difference in _check_file(folder, name, facts)]
    own = {name: facts for name, facts in files.items() if _strange(folder, name) is None}
    extra = [
        f"{path.relative_to(folder).as_posix()!r}: provenance.json does not list it, and it would be mixed in"
        for sub in TABLES.values()
        for path in sorted((folder / sub).glob("train-*"))
        if path.relative_to(folder).as_posix() not in files
    ]
    rows = {config: _rows(folder, own, sub) for config, sub in TABLES.items()}
    return Verification(len(files), rows, (*listed, *extra, *_check_card(folder, own, rows)))


def _check_file(folder: Path, name: str, facts: Any) -> Iterator[str]:
    if strange := _strange(folder, name):
        yield strange
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


def _strange(folder: Path, name: str) -> str | None:
    """Why a file that provenance.json names is not opened, if it is not."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return f"{name[:80]!r}: provenance.json names a file outside the folder"
    if name in ("README.md", "provenance.json") or not is_plain_path(name) or any(p.startswith(".") for p in pure.parts):
        return f"{name[:80]!r}: provenance.json names a file that is no part of a data set"
    if not is_inside(folder / name, homes_of(folder)):
        return f"{name}: a link that leads out of the folder"
    return None


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
    names = [name for name in files if name.startswith(f"{sub}/") and name.endswith(".parquet")]
    return sum(_table_rows(folder / name) or 0 for name in names)


def _check_card(folder: Path, files: Mapping[str, Any], rows: Mapping[str, int]) -> Iterator[str]:
    """What `datasets` goes by: where the card's configs point to, their rows and columns; and whole epochs of views."""
    if not is_inside(folder / "README.md", homes_of(folder)):
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
    for config, sub in TABLES.items():
        count, features = stated[config]
        if paths.get(config) != [{"split": "train", "path": f"{sub}/train-*"}]:
            yield f"README.md: config {config!r} is missing, or does not point to {sub}/train-*"
        if count != rows[config]:
            yield f"README.md: config {config!r} is said to have {count} rows, the tables have {rows[config]}"
        for name in (name for name in files if name.startswith(f"{sub}/") and _table_rows(folder / name)):
            if datasets.Features.from_arrow_schema(pq.read_schema(folder / name)) != features:
                yield f"README.md: config {config!r} is said to have other columns or types than {name}"
    if not rows["default"] or rows[VIEWS] % rows["default"]:
        yield f"{rows[VIEWS]} views of {rows['default']} images; expected whole epochs"


def verify(source: str | Path, *, revision: str | None = None, pauses: Sequence[float] = SHORT) -> Verification:
    """Check a data set folder, or download a Hub data set afresh and check that.

    Args:
        source: Folder, or Hub id.
        revision: Of a Hub data set.
        pauses: Seconds between tries of a download.

    Raises:
        HubError: It is neither a folder nor a Hub id, or cannot be downloaded.
    """
    if os.path.isdir(source):
        return check_folder(Path(source))
    api, repo_id = HfApi(), str(source)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is neither a folder here nor a Hub id (org/name); give one of the two") from error
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # not /tmp, which may be memory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:

        def fetch() -> tuple[str, ...]:
            commit = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
            api.snapshot_download(repo_id, repo_type="dataset", revision=commit, local_dir=place)
            # Card and pictures are not in provenance.json; the Hub's own list has the hashes of all files.
            report = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=commit, local_dir=place)
            wrong = [f"{item['path']}: other content than the Hub lists" for item in report.mismatches]
            return (*wrong, *(f"{path}: not downloaded" for path in report.missing_paths))

        arrived = again(fetch, f"downloading data set {repo_id!r}", pauses)
        found = check_folder(Path(place))
    return replace(found, differences=(*arrived, *found.differences))
