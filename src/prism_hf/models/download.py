"""Files of a teacher on the Hub, from the Hub or its cache: safetensors only.

One question to the Hub turns a branch or tag into a commit. The files of that commit that are read, and no others, go
into the ordinary Hugging Face cache: weights in a format that can run code when opened are never fetched.
"""

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
from ..runtime import BRIEF, UNREACHABLE, Facts, again, explain, hub_name, read_card, sha256_of, write_bytes

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

Wanted = Sequence[Sequence[str]]
"""Of each group of names the first file that there is; the last group are the weights, and an index brings its shards."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """The folder of a model and, if it is from the Hub, its commit and the license that its card states."""

    folder: Path
    commit: str | None = None
    license: str | None = None


class ShardIndex(Facts):
    """The index of weights in shards: tensor -> file; nothing but safetensors beside the index."""

    weight_map: dict[str, Annotated[str, Field(pattern=f"^{SHARD}$")]] = Field(min_length=1)


def fetch(name: str, source: str, wanted: Wanted) -> ModelFiles:
    """Bring files of `source`, ORG/NAME[@REVISION], into the Hugging Face cache, or find them there.

    A commit that is complete in the cache is not asked for. With HF_HUB_OFFLINE=1, or while the Hub gives no answer, a
    complete snapshot in the cache is used, and the log says so.

    Raises:
        TeacherError: One line: no such model or revision, no access, no safetensors, a missing file, a damaged file, or
            neither Hub nor complete cache.
    """
    try:
        folder = _snapshot(name, *_parse(source), wanted)
        for file in _chosen(folder, wanted):
            _check_content(folder / file)
    except (TeacherError, HubError) as error:
        raise TeacherError(f"teacher {name!r}: {error}") from error
    return ModelFiles(folder, folder.name, _license(folder))


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


def _snapshot(name: str, repo: str, revision: str, wanted: Wanted) -> Path:
    """Return the complete folder of a revision in the cache, from the Hub if need be."""
    folder = _cached_folder(repo, revision, wanted)
    if folder and COMMIT.fullmatch(revision) and not _lacking(folder, wanted):
        return folder
    try:
        info = _ask(repo, revision)
    except HubError as error:
        if not error.away:
            raise
        reason = explain(error.__cause__ or error)  # without the advice to try again later
    else:
        return _download(info, repo, revision, wanted)
    if folder is None:
        problem = f"nothing of {repo} at {revision!r} is in the cache {constants.HF_HUB_CACHE}"
    elif lacking := _lacking(folder, wanted):
        problem = f"the cache has {repo} at {revision!r} without {', '.join(lacking)}"
    else:
        level = logging.INFO if is_offline_mode() else logging.WARNING
        log.log(level, "teacher %r: %s; using commit %s of %s from the cache", name, reason, folder.name, repo)
        return folder
    at = "" if revision == constants.DEFAULT_REVISION else f" --revision {revision}"
    raise TeacherError(
        f"{reason}, and {problem}; run `hf download {repo}{at}` with a network and without HF_HUB_OFFLINE, or use "
        "local-dir:PATH"
    )


def _ask(repo: str, revision: str) -> ModelInfo:
    """Return commit and files of a revision; a `HubError` is `away` if the Hub gives no answer, or must not be asked."""

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


def _download(info: ModelInfo, repo: str, revision: str, wanted: Wanted) -> Path:
    """Bring what is read of a commit into the cache, and look whether all of it came."""
    commit = str(info.sha)
    names = _select({file.rfilename for file in info.siblings or ()}, f"{repo} at {revision!r}", wanted)
    folder = _cached_folder(repo, commit, wanted)
    if folder is None or not all((folder / name).is_file() for name in names):
        attempt = partial(snapshot_download, repo, revision=commit, allow_patterns=names)
        folder = Path(again(attempt, f"downloading {repo!r}", BRIEF))
    # The client returns what the cache has if the Hub stops answering half way.
    if lacking := _lacking(folder, wanted):
        raise TeacherError(f"{repo} at {commit} came without {', '.join(lacking)}; run again")
    _remember(folder, revision)
    return folder


def _select(files: Collection[str], origin: str, wanted: Wanted) -> list[str]:
    """Choose the files to fetch, out of those that a commit has."""
    best = _best(files, wanted)
    missing = [file for file in best if file not in files]
    if missing:
        pickled = sorted(file for file in files if file.endswith(PICKLED)) if best[-1] in missing else []
        but = f", only {', '.join(pickled[:3])}, which is not opened: a pickle can run any code" if pickled else ""
        raise TeacherError(
            f"{origin} has no {' and no '.join(missing)}{but}; expected a model saved by "
            "timm.models.save_for_hf(model, FOLDER, safe_serialization=True), or by model.save_pretrained(FOLDER) of "
            "transformers"
        )
    shards = [file for file in files if re.fullmatch(SHARD, file)] if INDEX in best else []
    return sorted({*best, *shards, *(file for file in OPTIONAL if file in files)})


def _best(files: Collection[str], wanted: Wanted) -> list[str]:
    """Name the first file that there is of each group, or its first name."""
    return [next((name for name in names if name in files), names[0]) for names in wanted]


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag is, as the Hub's client does, so that the cache answers offline.

    Only once all files have come: a broken download leaves the older, complete snapshot in use.
    """
    commit, note = folder.name, folder.parents[1] / "refs" / revision
    try:
        if revision != commit and (not note.is_file() or note.read_text(encoding="utf-8") != commit):
            write_bytes(note, commit.encode())
    except OSError as error:
        log.warning("the cache cannot note that %r is %s (%s); offline it will not be found", revision, commit, error)


def _cached_folder(repo: str, revision: str, wanted: Wanted) -> Path | None:
    """Return the folder of a revision in the cache, if it has any of the files."""
    paths = (try_to_load_from_cache(repo, name, revision=revision) for names in wanted for name in names)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def _chosen(folder: Path, wanted: Wanted) -> list[str]:
    """Name the files to read from a folder, shards included."""
    best = _best([path.name for path in folder.iterdir() if path.is_file()], wanted)
    if INDEX not in best:
        return best
    try:
        return best + sorted(set(ShardIndex.read(folder / INDEX).weight_map.values()))
    except ValueError as error:
        raise TeacherError(f"{error}; use other weights") from error


def _lacking(folder: Path, wanted: Wanted) -> list[str]:
    """Name the files without which nothing can be loaded from a folder."""
    return [file for file in _chosen(folder, wanted) if not (folder / file).is_file()]


def _check_content(path: Path) -> None:
    """Compare a large file with its SHA-256, the name of its blob in the cache; the clients compare only sizes."""
    expected = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(expected) and sha256_of(path) != expected:
        raise TeacherError(
            f"{path.name} is not what the Hub lists: expected the SHA-256 {expected[:12]}..., the file has another; "
            f"delete {path.parents[2]} and run again"
        )


def _license(folder: Path) -> str | None:
    try:
        card = read_card((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    license = card.get("license")
    if license == "other":
        license = card.get("license_name") or license
    return ", ".join(map(str, license)) if isinstance(license, list) else str(license or "") or None
