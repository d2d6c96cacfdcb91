"""A repo of the Hub to which something is to be published: what it holds; reads, and never writes."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile

from ..errors import HubError
from ..runtime import without_password
from .bundle import Entry, Kind

MAIN = "main"
RepoInfo = DatasetInfo | ModelInfo


@dataclass(frozen=True)
class Target:
    """Where a publication goes.

    Attributes:
        repo_id: `namespace/name`.
        kind: `dataset` or `model`.
        public: Whether everybody may read the repo.
        revision: Branch, made if it is not there.
        create_pr: Open a pull request to the main branch instead of changing it.
        replace_other: Publish even over something else that the repo holds.
    """

    repo_id: str
    kind: Kind = "dataset"
    public: bool = False
    revision: str = MAIN
    create_pr: bool = False
    replace_other: bool = False


class Repository:
    """The repo of a target, as it is at each question; `api` is the client that asks."""

    def __init__(self, target: Target) -> None:
        self.target, self.api = target, HfApi()

    def info(self, revision: str | None = None) -> RepoInfo | None:
        """What the Hub says of the repo, or `None` if it is not there."""
        try:
            info = self.api.repo_info(self.target.repo_id, repo_type=self.target.kind, revision=revision)
        except RepositoryNotFoundError:
            return None
        assert isinstance(info, RepoInfo)
        return info

    def head(self, revision: str) -> str | None:
        """The commit that a branch is at, or `None` if there is no such branch."""
        try:
            info = self.info(revision)
        except RevisionNotFoundError:
            return None
        return info.sha if info else None

    def must_have(self, revision: str) -> str:
        """The commit that a branch is at, which must be there."""
        head = self.head(revision)
        if head is None:
            raise HubError(f"{self.target.repo_id!r} has no branch {revision!r}; was it removed just now?")
        return head

    def check_visibility(self) -> None:
        """Nothing goes into a public repo unasked."""
        info = self.info()
        if not self.target.public and info is not None and info.private is False:
            raise HubError(
                f"{self.target.repo_id!r} is public, and a push is private unless it says --public; say so, or make the "
                "repo private in its settings first"
            )

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """All files of a commit."""
        repo_id, kind = self.target.repo_id, self.target.kind
        entries = self.api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=kind)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read(self, file: RepoFile, commit: str) -> bytes:
        """The content of a small file, checked against the tree: downloads look at the size alone."""
        repo_id, kind = self.target.repo_id, self.target.kind
        with tempfile.TemporaryDirectory() as cache:
            local = self.api.hf_hub_download(repo_id, file.path, repo_type=kind, revision=commit, cache_dir=cache)
            content = Path(local).read_bytes()
        if not Entry(content, hashlib.sha256(content).hexdigest()).equal(file):
            raise ConnectionError(f"{file.path} arrived with other content than the Hub lists")
        return content

    def commit_url(self, commit: str) -> str:
        """The page of a commit."""
        prefix = "datasets/" if self.target.kind == "dataset" else ""
        return f"{without_password(self.api.endpoint)}/{prefix}{self.target.repo_id}/commit/{commit}"
