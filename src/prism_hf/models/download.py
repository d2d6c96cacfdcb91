"""Download the files of a teacher from the Hub, or find them in the cache; weights are safetensors only.

One request to the Hub resolves a branch or tag to a commit. Only the files that are needed from that commit are downloaded,
into the standard Hugging Face cache. Weights in a format that can run code when opened are never downloaded.
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
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OPTIONAL = (CARD, *PROCESSORS, ADAPTER)

SHARD = r"model-[0-9]+-of-[0-9]+\.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar", ".npz")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

Wanted = Sequence[Sequence[str]]
"""Groups of file names. The first existing file of each is used; the last group is the weights, or an index of shards."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """The folder of a model and, if it comes from the Hub, its commit and the license stated on its card."""

    folder: Path
    commit: str | None = None
    license: str | None = None


class ShardIndex(Facts):
    """The index of sharded weights, tensor -> file; all files are safetensors in the folder of the index."""

    weight_map: dict[str, Annotated[str, Field(pattern=f"^{SHARD}$")]] = Field(min_length=1)


def fetch(name: str, source: str, wanted: Wanted) -> ModelFiles:
    """Download files of `source`, ORG/NAME[@REVISION], into the Hugging Face cache, or find them there.

    A commit that is complete in the cache needs no request. With HF_HUB_OFFLINE=1, or if the Hub does not respond, a
    complete snapshot in the cache is used, and this is logged.

    Raises:
        TeacherError: One line: no such model or revision, no access, no safetensors, a missing or damaged file, or
            neither the Hub nor a complete snapshot is available.
    """
    try:
        folder = _snapshot(name, *_parse(source), wanted)
        for file in _required(folder, wanted):
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
    """Return the complete folder of a revision in the cache; download it from the Hub if necessary."""
    folder = _cached_folder(repo, revision, wanted)
    if folder and COMMIT.fullmatch(revision) and not _missing(folder, wanted):
        return folder
    try:
        info = _model_info(repo, revision)
    except HubError as error:
        if not error.away:
            raise
        reason = explain(error.__cause__ or error)  # without the advice to try again later
    else:
        return _download(info, repo, revision, wanted)
    if folder is None:
        problem = f"the cache {constants.HF_HUB_CACHE} has no files of {repo} at {revision!r}"
    elif missing := _missing(folder, wanted):
        problem = f"the cache has {repo} at {revision!r} without {', '.join(missing)}"
    else:
        level = logging.INFO if is_offline_mode() else logging.WARNING
        log.log(level, "teacher %r: %s; using commit %s of %s from the cache", name, reason, folder.name, repo)
        return folder
    at = "" if revision == constants.DEFAULT_REVISION else f" --revision {revision}"
    raise TeacherError(
        f"{reason}, and {problem}; run `hf download {repo}{at}` while online and without HF_HUB_OFFLINE, or use "
        "local-dir:PATH"
    )


def _model_info(repo: str, revision: str) -> ModelInfo:
    """Return commit and files of a revision; a `HubError` is `away` if the Hub does not respond, or in offline mode."""

    def attempt() -> ModelInfo:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (TypeError, KeyError):  # valid JSON, but not a model description
            info = None
        if info is None or not COMMIT.fullmatch(info.sha or ""):
            raise HubError(f"{hub_name()} returned no commit for {repo}; check HF_ENDPOINT and the proxy", away=True)
        return info

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE=1 is set", away=True)
    return again(attempt, f"asking the Hub for {repo!r} at {revision!r}", BRIEF, at_once=UNREACHABLE)


def _download(info: ModelInfo, repo: str, revision: str, wanted: Wanted) -> Path:
    """Download the needed files of a commit into the cache, and check that none is missing."""
    commit = str(info.sha)
    names = _select({file.rfilename for file in info.siblings or ()}, f"{repo} at {revision!r}", wanted)
    folder = _cached_folder(repo, commit, wanted)
    if folder is None or not all((folder / name).is_file() for name in names):
        attempt = partial(snapshot_download, repo, revision=commit, allow_patterns=names)
        folder = Path(again(attempt, f"downloading {repo!r}", BRIEF))
    # If the Hub stops responding midway, the client returns an incomplete folder without an error.
    if missing := _missing(folder, wanted):
        raise TeacherError(f"{repo} at {commit} was downloaded without {', '.join(missing)}; run again")
    _record_commit(folder, revision)
    return folder


def _select(files: Collection[str], origin: str, wanted: Wanted) -> list[str]:
    """Return the names of the files to download, out of the files of a commit."""
    chosen = _first_existing(files, wanted)
    missing = [file for file in chosen if file not in files]
    if missing:
        pickled = sorted(file for file in files if file.endswith(PICKLED)) if chosen[-1] in missing else []
        hint = f", only {', '.join(pickled[:3])}, which is not opened because a pickle can run any code" if pickled else ""
        raise TeacherError(
            f"{origin} has no {' or '.join(missing)}{hint}; expected a model saved with "
            "timm.models.save_for_hf(model, FOLDER, safe_serialization=True), or with model.save_pretrained(FOLDER) in "
            "transformers"
        )
    shards = [file for file in files if re.fullmatch(SHARD, file)] if INDEX in chosen else []
    return sorted({*chosen, *shards, *(file for file in OPTIONAL if file in files)})


def _first_existing(files: Collection[str], wanted: Wanted) -> list[str]:
    """Return the first existing file of each group, or the first name of the group if none exists."""
    return [next((name for name in names if name in files), names[0]) for names in wanted]


def _record_commit(folder: Path, revision: str) -> None:
    """Record the commit of a branch or tag, as the Hub client does, so that the cache can resolve it offline.

    Called only after all files have arrived: after a broken download, the older, complete snapshot stays in use.
    """
    commit, note = folder.name, folder.parents[1] / "refs" / revision
    try:
        if revision != commit and (not note.is_file() or note.read_text(encoding="utf-8") != commit):
            write_bytes(note, commit.encode())
    except OSError as error:
        log.warning("cannot record in the cache that %r is %s (%s); it will not be found offline", revision, commit, error)


def _cached_folder(repo: str, revision: str, wanted: Wanted) -> Path | None:
    """Return the folder of a revision in the cache, or `None` if the cache has none of the files."""
    paths = (try_to_load_from_cache(repo, name, revision=revision) for names in wanted for name in names)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def _required(folder: Path, wanted: Wanted) -> list[str]:
    """Return the names of the files to read from a folder, including shards."""
    chosen = _first_existing([path.name for path in folder.iterdir() if path.is_file()], wanted)
    if INDEX not in chosen:
        return chosen
    try:
        return chosen + sorted(set(ShardIndex.read(folder / INDEX).weight_map.values()))
    except ValueError as error:
        raise TeacherError(f"{error}; use other weights") from error


def _missing(folder: Path, wanted: Wanted) -> list[str]:
    """Return the names of the required files that a folder lacks."""
    return [file for file in _required(folder, wanted) if not (folder / file).is_file()]


def _check_content(path: Path) -> None:
    """Verify the SHA-256 of a large file, the name of its blob in the cache; the Hub clients compare only sizes."""
    expected = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(expected) and sha256_of(path) != expected:
        raise TeacherError(
            f"{path.name} does not match the Hub: expected SHA-256 {expected[:12]}..., but the file has another; "
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
