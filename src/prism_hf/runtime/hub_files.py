"""Read a repo of the Hub: which commit a revision is at, and files of that commit, in the Hub's ordinary cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from ..errors import HubError
from .hub_client import SHORT, again, hub_name
from .store import write_bytes

log = logging.getLogger(__name__)
Kind = Literal["dataset", "model"]
COMMIT = re.compile(r"[0-9a-f]{40}")


def repo_info(repo_id: str, kind: Kind, revision: str | None) -> ModelInfo | DatasetInfo:
    """Ask once for the commit (`sha`) that a revision is at now, and for its files (`siblings`); for use in `again`.

    Raises:
        HubError: The answer is not one of a Hub.
    """
    info = None
    try:
        info = HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (TypeError, KeyError, AttributeError) as error:  # JSON of something else
        log.debug("the answer of the Hub cannot be read: %r", error)
    if not isinstance(info, ModelInfo | DatasetInfo) or not COMMIT.fullmatch(info.sha or ""):
        raise HubError(f"{hub_name()} names no commit of {repo_id}; check HF_ENDPOINT and the proxy", away=True)
    return info


def fetch_snapshot(
    repo_id: str, kind: Kind, revision: str | None, patterns: Sequence[str], *, pauses: Sequence[float] = SHORT
) -> Path:
    """Bring the files of one commit that match a pattern into the Hub's cache.

    With HF_HUB_OFFLINE=1, the answer is what the cache has of the revision; the caller checks that it is enough.

    Returns:
        Their folder in the cache, named after the commit.

    Raises:
        HubError: One line: no such repo or revision, no access, no answer, or, offline, nothing of it in the cache.
    """
    revision = revision or constants.DEFAULT_REVISION
    if is_offline_mode() or COMMIT.fullmatch(revision):
        return download(repo_id, kind, revision, patterns, pauses=pauses)
    info = again(lambda: repo_info(repo_id, kind, revision), f"asking the Hub for {repo_id!r}", pauses)
    folder = download(repo_id, kind, str(info.sha), patterns, pauses=pauses)
    remember(folder, revision)
    return folder


def download(repo_id: str, kind: Kind, commit: str, patterns: Sequence[str], *, pauses: Sequence[float] = SHORT) -> Path:
    """Bring the files of a commit that match a pattern into the Hub's cache; see `fetch_snapshot`."""
    return again(
        lambda: Path(snapshot_download(repo_id, repo_type=kind, revision=commit, allow_patterns=list(patterns))),
        f"downloading {kind} {repo_id!r}",
        pauses,
    )


def remember(folder: Path, revision: str) -> None:
    """Note which commit a branch or tag is, as the Hub's client does, so that the cache answers offline.

    Call it once all files have arrived: after a broken download the older, complete snapshot stays in use.
    """
    commit, note = folder.name, folder.parents[1] / "refs" / revision
    if revision == commit:
        return
    try:
        if not note.is_file() or note.read_text(encoding="utf-8") != commit:
            write_bytes(note, commit.encode())
    except OSError as error:
        log.warning("the cache cannot note that %r is %s (%s); offline it will not be found", revision, commit, error)
