"""Where a Hub teacher's files come from: the Hub or its cache, safetensors only.

One question to the Hub turns a branch or tag into a commit. The files of that commit that are read, and no others, go
into the ordinary Hugging Face cache: weights in a format that can run code when opened are never fetched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from huggingface_hub import HfApi, ModelInfo, constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from pydantic import Field

from ..errors import HubError, TeacherError
from ..runtime import Facts, read_header, sha256_of, write_bytes
from ..runtime.hub_client import BRIEF, UNREACHABLE, again, explain, hub_name

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
CARD = "README.md"
OPTIONAL = (CARD, "preprocessor_config.json", "processor_config.json", ADAPTER)

SHARD = r"model-[0-9]+-of-[0-9]+\.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar", ".npz")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFiles:
    """The files of one commit of a model on the Hub.

    Attributes:
        folder: Where they are on this disk.
        commit: The commit they belong to.
        licence: As the model's card says, or `None`.
    """

    folder: Path
    commit: str
    licence: str | None


class _Index(Facts):
    """The index of weights in shards: tensor -> file, like model-00001-of-00002.safetensors."""

    weight_map: dict[str, Annotated[str, Field(pattern=f"^{SHARD}$")]] = Field(min_length=1)


def shard_names(index: Path) -> list[str]:
    """Return the names of the safetensors files that an index of shards lists.

    Raises:
        ValueError: It is not such an index, or lists anything but safetensors files beside itself; one line.
    """
    return sorted(set(_Index.read(index).weight_map.values()))


def fetch(name: str, source: str, *, needed: Sequence[str] = (CONFIG,), weights: Sequence[str] = (WEIGHTS,)) -> HubFiles:
    """Bring a model's files into the Hugging Face cache, or find them there.

    A commit that is complete in the cache is not asked for. With HF_HUB_OFFLINE=1, or while the Hub gives no answer, a
    complete snapshot in the cache is used, and the log says so.

    Args:
        name: The teacher, for messages.
        source: `ORG/NAME` or `ORG/NAME@REVISION`.
        needed: Files that must be there beside the weights.
        weights: Names of the weights, best first; an index brings its shards.

    Raises:
        TeacherError: One line: no such model or revision, no access, no safetensors, a missing file, a damaged file, or
            neither Hub nor complete cache.
    """
    try:
        folder = _snapshot(name, *_parse(source), needed, weights)
        for file in _weight_files(folder, weights):
            _check_content(folder / file)
    except (TeacherError, HubError) as error:
        raise TeacherError(f"teacher {name!r}: {error}") from error
    return HubFiles(folder, folder.name, _licence(folder))


def _snapshot(name: str, repo: str, revision: str, needed: Sequence[str], weights: Sequence[str]) -> Path:
    """Return the complete folder of a revision in the cache, from the Hub if need be."""
    folder = _cached_folder(repo, revision, (*needed, *weights))
    if folder and COMMIT.fullmatch(revision) and not _lacking(folder, needed, weights):
        return folder
    try:
        info = _ask(repo, revision)
    except HubError as error:
        if not error.away:
            raise
        reason = explain(error.__cause__ or error)  # without the advice to try again later
    else:
        return _download(info, repo, revision, needed, weights)
    lacking = _lacking(folder, needed, weights) if folder else []
    if folder and not lacking:
        level = logging.INFO if is_offline_mode() else logging.WARNING
        log.log(level, "teacher %r: %s; using commit %s of %s from the cache", name, reason, folder.name, repo)
        return folder
    origin = f"{repo} at {revision!r}"
    problem = f"the cache has {origin} without {', '.join(lacking)}"
    if folder is None:
        problem = f"nothing of {origin} is in the cache {constants.HF_HUB_CACHE}"
    at = "" if revision == constants.DEFAULT_REVISION else f" --revision {revision}"
    raise TeacherError(
        f"{reason}, and {problem}; run `hf download {repo}{at}` with a network and without HF_HUB_OFFLINE, or use "
        "local-dir:PATH"
    )


def _parse(source: str) -> tuple[str, str]:
    repo, at, revision = source.partition("@")
    revision = revision if at else constants.DEFAULT_REVISION
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise TeacherError(f"{source!r} is neither a Hub id ORG/NAME[@REVISION] nor, for transformers, a folder") from error
    # The revision becomes part of a path in the cache.
    if not revision or ".." in revision or revision.startswith("/") or re.search(r"[\s\\:@\x00-\x1f]", revision):
        raise TeacherError(f"{revision!r} is not a branch, tag or commit; expected ORG/NAME@REVISION")
    return repo, revision


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _ask(repo: str, revision: str) -> ModelInfo:
    """Return commit and files of a revision.

    Raises:
        HubError: The Hub says no; `away` if it gives no answer, or must not be asked.
    """

    def attempt() -> ModelInfo:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (TypeError, KeyError):  # JSON of something else
            info = None
        if info is None or not COMMIT.fullmatch(info.sha or ""):
            raise HubError(f"{hub_name()} names no commit of {repo}; check HF_ENDPOINT and the proxy", away=True)
        return info

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE=1 is set", away=True)
    return again(attempt, f"asking the Hub for {repo!r} at {revision!r}", BRIEF, at_once=UNREACHABLE)


def _download(info: ModelInfo, repo: str, revision: str, needed: Sequence[str], weights: Sequence[str]) -> Path:
    """Bring what is read of a commit into the cache, and look whether all of it came."""
    commit = str(info.sha)
    names = _select({file.rfilename for file in info.siblings or ()}, f"{repo} at {revision!r}", needed, weights)
    folder = _cached_folder(repo, commit, (*needed, *weights))
    if folder is None or not all((folder / name).is_file() for name in names):
        attempt = partial(snapshot_download, repo, revision=commit, allow_patterns=names)
        folder = Path(again(attempt, f"downloading {repo!r}", BRIEF))
    # The client returns what the cache has if the Hub stops answering half way.
    if lacking := _lacking(folder, needed, weights):
        raise TeacherError(f"{repo} at {commit} came without {', '.join(lacking)}; run again")
    _remember(folder, revision)
    return folder


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag is, as the Hub's client does, so that the cache answers offline.

    Only once all files have come: a broken download leaves the older, complete snapshot in use.
    """
    commit, note = folder.name, folder.parents[1] / "refs" / revision
    if revision == commit:
        return
    try:
        if not note.is_file() or note.read_text(encoding="utf-8") != commit:
            write_bytes(note, commit.encode())
    except OSError as error:
        log.warning("the cache cannot note that %r is %s (%s); offline it will not be found", revision, commit, error)


def _select(files: Collection[str], origin: str, needed: Sequence[str], weights: Sequence[str]) -> list[str]:
    """Choose the files to fetch, out of those that a commit has."""
    best = next((file for file in weights if file in files), None)
    missing = [file for file in needed if file not in files] + ([] if best else [weights[0]])
    if best is None or missing:
        pickled = [] if best else sorted(file for file in files if file.endswith(PICKLED))
        but = f", only {', '.join(pickled[:3])}, which is not opened: a pickle can run any code" if pickled else ""
        raise TeacherError(
            f"{origin} has no {' and no '.join(missing)}{but}; expected a model saved by "
            "timm.models.save_for_hf(model, FOLDER, safe_serialization=True), or by model.save_pretrained(FOLDER) of "
            "transformers"
        )
    shards = [file for file in files if re.fullmatch(SHARD, file)] if best == INDEX else []
    return sorted({*needed, best, *shards, *(file for file in OPTIONAL if file in files)})


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached_folder(repo: str, revision: str, files: Sequence[str]) -> Path | None:
    """Return the folder of a revision in the cache, if it has any of these files."""
    paths = (try_to_load_from_cache(repo, file, revision=revision) for file in files)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def _weight_files(folder: Path, weights: Sequence[str]) -> list[str]:
    """Name the best weights that a folder has (the first of all if it has none), and the shards that an index lists."""
    best = next((file for file in weights if (folder / file).is_file()), weights[0])
    if best != INDEX:
        return [best]
    try:
        return [best, *shard_names(folder / INDEX)]
    except ValueError as error:
        raise TeacherError(f"{error}; use other weights") from error


def _lacking(folder: Path, needed: Sequence[str], weights: Sequence[str]) -> list[str]:
    """Name the files without which nothing can be loaded from a folder."""
    return [file for file in (*needed, *_weight_files(folder, weights)) if not (folder / file).is_file()]


def _check_content(path: Path) -> None:
    """Compare a large file with its SHA-256, the name of its blob in the cache; the clients compare only sizes."""
    expected = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(expected) and sha256_of(path) != expected:
        raise TeacherError(
            f"{path.name} is not what the Hub lists: expected the SHA-256 {expected[:12]}..., the file has another; "
            f"delete {path.parents[2]} and run again"
        )


def _licence(folder: Path) -> str | None:
    """Return the license that the model's card states."""
    try:
        card = read_header((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(card, dict):
        return None
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name") or licence
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "") or None
