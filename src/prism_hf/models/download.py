"""Where a Hub teacher's files come from: the Hub or its cache, safetensors only.

One question to the Hub turns a branch or tag into a commit. The files of that commit that are read, and no others, go
into the ordinary Hugging Face cache: weights in a format that can run code when opened are never fetched.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import TeacherError
from ..runtime.plain_yaml import read_header
from ..runtime.store import sha256_of, write_bytes
from ..runtime.untrusted import without_password

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar", ".npz")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
PAUSES_S = (0.5, 1.0, 2.0)
"""Before each further try; the client itself does not retry this question."""

_DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, httpx2.HTTPError, XetDownloadError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFiles:
    """What was read of one commit of a model on the Hub.

    Attributes:
        folder: Its files on this disk.
        commit: The commit they belong to.
        weights: Name of the weights' file, or of the index of its shards.
        licence: As the model's card says, or `None`.
    """

    folder: Path
    commit: str
    weights: str
    licence: str | None


@dataclass(frozen=True)
class _Want:
    """One teacher's files: all of `needed`, the first of `weights` that there is, and those of `welcome` that there are."""

    name: str
    repo: str
    revision: str
    needed: tuple[str, ...]
    weights: tuple[str, ...]
    welcome: tuple[str, ...]

    def error(self, problem: str) -> TeacherError:
        return TeacherError(f"teacher {self.name!r}: {problem}")


class _HubIsAwayError(Exception):
    """The Hub gives no answer now; its text says why."""


def fetch(
    name: str,
    source: str,
    *,
    needed: Sequence[str] = (CONFIG,),
    weights: Sequence[str] = (WEIGHTS,),
    welcome: Sequence[str] = (),
) -> HubFiles:
    """Bring a model's files into the Hugging Face cache, or find them there.

    A commit that is complete in the cache is not asked for. With HF_HUB_OFFLINE=1, or while the Hub is not reachable, a
    complete snapshot in the cache is used, and the log says so.

    Args:
        name: The teacher, for messages.
        source: `ORG/NAME` or `ORG/NAME@REVISION`.
        needed: Files that must be there.
        weights: Names of the weights, best first; an index brings its shards.
        welcome: Files that are fetched if there are any.

    Raises:
        TeacherError: One line: no such model or revision, no access, no safetensors, a missing file, a damaged file, or
            neither Hub nor complete cache.
    """
    repo, revision = _parse(name, source)
    want = _Want(name, repo, revision, tuple(needed), tuple(weights), (*welcome, CARD))
    cached = _cached_folder(want, revision)
    if COMMIT.fullmatch(revision) and cached and not _lacking(want, cached):
        return _described(want, cached)
    if is_offline_mode():
        return _from_cache(want, cached, "HF_HUB_OFFLINE=1 is set", logging.INFO)
    try:
        info = _ask(want)
    except _HubIsAwayError as error:
        return _from_cache(want, cached, str(error), logging.WARNING)
    folder = _download(want, info)
    _remember(folder, revision)
    return _described(want, folder)


def shard_names(index: Path) -> list[str]:
    """Names of the safetensors files that an index of shards lists.

    Raises:
        ValueError: It is no such index, or lists anything but safetensors files beside itself.
    """
    listed = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict) or not listed["weight_map"]:
        raise ValueError(f"{index.name} has no weight_map")
    names = sorted({str(shard) for shard in listed["weight_map"].values()})
    foreign = [shard for shard in names if not SHARD.fullmatch(shard)]
    if foreign:
        raise ValueError(f"{index.name} lists {foreign[0]!r}; expected names like model-00001-of-00002.safetensors")
    return names


def _parse(name: str, source: str) -> tuple[str, str]:
    repo, at, revision = source.partition("@")
    revision = revision if at else constants.DEFAULT_REVISION
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise TeacherError(
            f"teacher {name!r}: {source!r} is neither a Hub id ORG/NAME[@REVISION] nor, for transformers, a folder"
        ) from error
    # The revision becomes part of a path in the cache.
    if not revision or ".." in revision or revision.startswith("/") or re.search(r"[\s\\:@\x00-\x1f]", revision):
        raise TeacherError(f"teacher {name!r}: {revision!r} is no branch, tag or commit; expected ORG/NAME@REVISION")
    return repo, revision


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached_folder(want: _Want, revision: str) -> Path | None:
    for file in (*want.needed, *want.weights):
        path = try_to_load_from_cache(want.repo, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _weights_in(want: _Want, files: Collection[str]) -> str | None:
    return next((file for file in want.weights if file in files), None)


def _lacking(want: _Want, folder: Path) -> list[str]:
    """Files without which nothing can be loaded from this folder."""
    lacking = [file for file in want.needed if not (folder / file).is_file()]
    weights = _weights_in(want, [file for file in want.weights if (folder / file).is_file()])
    if weights is None:
        return [*lacking, want.weights[0]]
    if weights == INDEX:
        lacking += [shard for shard in _shards(want, folder) if not (folder / shard).is_file()]
    return lacking


def _shards(want: _Want, folder: Path) -> list[str]:
    try:
        return shard_names(folder / INDEX)
    except (OSError, ValueError, RecursionError) as error:
        raise want.error(f"{error}; {folder / INDEX} is damaged or no index of safetensors, use other weights") from error


def _from_cache(want: _Want, folder: Path | None, reason: str, level: int) -> HubFiles:
    """What the cache has of the wanted revision, because the Hub cannot be asked."""
    there = f"{want.repo} at {want.revision!r}"
    if folder is None:
        raise want.error(f"{reason}, and nothing of {there} is in the cache {constants.HF_HUB_CACHE}; {_how_to_get(want)}")
    if lacking := _lacking(want, folder):
        raise want.error(f"{reason}, and the cache has {there} without {', '.join(lacking)}; {_how_to_get(want)}")
    logger.log(level, "teacher %r: %s; using commit %s of %s from the cache", want.name, reason, folder.name, want.repo)
    return _described(want, folder)


def _how_to_get(want: _Want) -> str:
    at = "" if want.revision == constants.DEFAULT_REVISION else f" --revision {want.revision}"
    return f"run `hf download {want.repo}{at}` with a network and without HF_HUB_OFFLINE, or use local-dir:PATH"


def _described(want: _Want, folder: Path) -> HubFiles:
    weights = _weights_in(want, [path.name for path in folder.iterdir()])
    assert weights is not None, "the folder is complete"
    for file in _shards(want, folder) if weights == INDEX else [weights]:
        _check_content(want, folder / file)
    return HubFiles(folder, folder.name, weights, _licence(folder))


def _check_content(want: _Want, path: Path) -> None:
    """The clients compare only sizes; in the cache, a large file is a link to a blob named after its SHA-256."""
    expected = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(expected) and sha256_of(path) != expected:
        raise want.error(
            f"{path.name} is not what the Hub lists: expected the SHA-256 {expected[:12]}..., the file has another; "
            f"delete {path.parents[2]} and run again"
        )


def _licence(folder: Path) -> str | None:
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


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag is, as the Hub's client does, so that the cache answers offline.

    Only once all files are there: a broken download leaves the older, complete snapshot in use.
    """
    commit, note = folder.name, folder.parents[1] / "refs" / revision
    if revision == commit:
        return
    try:
        if not note.is_file() or note.read_text(encoding="utf-8") != commit:
            write_bytes(note, commit.encode())
    except OSError as error:
        logger.warning("the cache cannot note that %r is %s (%s); offline it will not be found", revision, commit, error)


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _ask(want: _Want) -> ModelInfo:
    """Commit and files of the wanted revision.

    Raises:
        TeacherError: The Hub says no.
        _HubIsAwayError: The Hub says nothing, or nothing yet.
    """
    hub = f"the Hub at {_endpoint()}"
    # No text of a network error is shown: it can quote the header that holds the token.
    for pause_s in (*PAUSES_S, None):
        try:
            info = HfApi().model_info(want.repo, revision=want.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise _refusal(want, error) from error
            reason = f"{hub} answers {error.response.status_code}"
        except (httpx2.ReadError, httpx2.RemoteProtocolError) as error:
            reason = f"{hub} breaks off ({type(error).__name__})"
        except (httpx2.LocalProtocolError, UnicodeEncodeError) as error:
            raise want.error(
                "the token holds characters that no token has; set HF_TOKEN anew or run `hf auth login`"
            ) from error
        except httpx2.TransportError as error:
            raise _HubIsAwayError(f"{hub} is not reachable ({type(error).__name__})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise _HubIsAwayError(f"{hub} does not answer as a Hub does; check HF_ENDPOINT and the proxy") from error
        else:
            if not COMMIT.fullmatch(info.sha or ""):
                raise _HubIsAwayError(f"{hub} names no commit; check HF_ENDPOINT")
            return info
        if pause_s is not None:
            time.sleep(pause_s)
    raise _HubIsAwayError(reason)


def _endpoint() -> str:
    """Where the Hub is, without a password that the address may hold."""
    return without_password(constants.ENDPOINT)


def _refusal(want: _Want, error: HfHubHTTPError) -> TeacherError:
    repo, status = want.repo, error.response.status_code
    if isinstance(error, GatedRepoError):
        return want.error(
            f"{repo} is gated ({status}); ask for access at {_endpoint()}/{repo}, then set HF_TOKEN or run "
            "`hf auth login` with the account that has it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return want.error(
            f"the Hub has no model {repo}, or it is private ({status}); check the spelling, or set HF_TOKEN or run "
            "`hf auth login` with an account that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return want.error(f"{repo} has no revision {want.revision!r}; expected one of its branches, tags or commits")
    if status == 401:
        return want.error(
            "the Hub does not accept the token (401); renew HF_TOKEN or run `hf auth login`, or unset it for a public model"
        )
    if status == 403:
        return want.error(f"the token may not read {repo} (403); give it read access to this model, or use another one")
    return want.error(f"the Hub answers {status} to a question for {repo}; check the name, or try again later")


def _select(want: _Want, files: Collection[str]) -> list[str]:
    """The files to fetch, out of those that the commit has."""
    if missing := [file for file in want.needed if file not in files]:
        raise want.error(
            f"{want.repo} at {want.revision!r} has no {', '.join(missing)}; expected a model saved by timm or transformers"
        )
    weights = _weights_in(want, files)
    if weights is None:
        pickled = sorted(file for file in files if file.endswith(PICKLED))
        found = f"only {', '.join(pickled[:3])}, which are not opened: a pickle can run any code" if pickled else "none"
        raise want.error(
            f"expected weights as {want.weights[0]} in {want.repo}, found {found}; save them with "
            "timm.models.save_for_hf(model, FOLDER, safe_serialization=True), or model.save_pretrained(FOLDER) for "
            "transformers, and use that folder"
        )
    shards = [file for file in files if SHARD.fullmatch(file)] if weights == INDEX else []
    return sorted({*want.needed, weights, *shards, *(file for file in want.welcome if file in files)})


def _download(want: _Want, info: ModelInfo) -> Path:
    commit = str(info.sha)
    names = _select(want, {file.rfilename for file in info.siblings or ()})
    folder = _cached_folder(want, commit)
    if folder is None or not all((folder / name).is_file() for name in names):
        try:
            folder = Path(snapshot_download(want.repo, revision=commit, allow_patterns=names))
        except _DOWNLOAD_ERRORS as error:
            refused = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if isinstance(refused, HfHubHTTPError) and refused.response.status_code not in TRANSIENT:
                raise _refusal(want, refused) from error
            raise want.error(f"the download of {want.repo} broke off ({type(error).__name__}); run again") from error
    # The client returns what the cache has if the Hub stops answering half way.
    if lacking := _lacking(want, folder):
        raise want.error(f"{want.repo} at {commit} came without {', '.join(lacking)}; run again")
    return folder
