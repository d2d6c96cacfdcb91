"""Read a repo of the Hub and check whether something may be published there; never writes."""

import hashlib
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile

from ..dataset import hub_id_problem
from ..errors import HubError
from ..runtime import SHORT, again, without_password
from .bundle import LABELS, Entry, Kind, name_in

MAIN = "main"


@dataclass(frozen=True)
class Target:
    """The destination of a push."""

    repo_id: str  # `namespace/name`, or a name in the namespace of the user
    kind: Kind = "dataset"
    public: bool = False  # whether everybody can read the repo
    revision: str = MAIN  # a branch; it is created if it does not exist
    create_pr: bool = False  # open a pull request to the main branch instead of changing it
    replace_other: bool = False  # publish even if the repo contains something else


class Repository:
    """The repo of a target, read anew by each call; `where` are the first arguments of the methods of `api`."""

    def __init__(self, target: Target) -> None:
        self.target, self.api = target, HfApi()
        self.where: dict[str, Any] = {"repo_id": target.repo_id, "repo_type": target.kind}

    def info(self, revision: str | None = None) -> DatasetInfo | ModelInfo | None:
        """Return the information that the Hub has about the repo, or `None` if there is no such repo."""
        try:
            info = self.api.repo_info(**self.where, revision=revision)
        except RepositoryNotFoundError:
            return None
        assert isinstance(info, DatasetInfo | ModelInfo)
        return info

    def head(self, revision: str) -> str | None:
        """Return the commit that a branch points to, or `None` if there is no such branch."""
        try:
            info = self.info(revision)
        except RevisionNotFoundError:
            return None
        return info.sha if info else None

    def must_have(self, revision: str) -> str:
        """Return the commit that a branch points to; a missing branch is a `HubError`."""
        head = self.head(revision)
        if head is None:
            raise HubError(f"{self.target.repo_id!r} has no branch {revision!r}; was it just removed?")
        return head

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """Return all files of a commit by path."""
        entries = self.api.list_repo_tree(**self.where, recursive=True, revision=commit)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read(self, file: RepoFile, commit: str) -> bytes:
        """Return the content of a small file, compared with the hash in the tree: downloads check the size only."""
        with tempfile.TemporaryDirectory() as cache:
            local = self.api.hf_hub_download(**self.where, filename=file.path, revision=commit, cache_dir=cache)
            content = Path(local).read_bytes()
        if not Entry(content, hashlib.sha256(content).hexdigest()).equal(file):
            raise ConnectionError(f"{file.path} has other content than the Hub lists")
        return content

    def commit_url(self, commit: str) -> str:
        """Return the URL of the page of a commit."""
        prefix = "datasets/" if self.target.kind == "dataset" else ""
        return f"{without_password(self.api.endpoint)}/{prefix}{self.target.repo_id}/commit/{commit}"

    def check_visibility(self) -> None:
        """Refuse to push into a public repo without --public."""
        info = self.info()
        if not self.target.public and info is not None and info.private is False:
            raise HubError(
                f"{self.target.repo_id!r} is public; push with --public, or make it private in its settings first"
            )

    def check_occupant(self, name: str, head: str) -> None:
        """Refuse to overwrite anything but an older version of `name` or an empty repo."""
        tree = self.tree(head)
        content = sorted(set(tree) - {".gitattributes", "README.md", "LICENSE"})
        if self.target.replace_other or not content:
            return
        label = next((path for path in LABELS if path in tree), None)
        title = name_in(label, self.read(tree[label], head)) if label else None
        if title != name:
            occupant = repr(title) if title else f"files that prism-hf did not make ({', '.join(content[:3])})"
            raise HubError(f"{self.target.repo_id!r} contains {occupant}, not {name!r}; use another name, or --replace")


def check_here(target: Target) -> None:
    """Check the name, branch and token of a target, and offline mode, without a request to the Hub."""
    problem = hub_id_problem(target.repo_id)
    if problem is not None:
        raise HubError(f"{target.repo_id!r} is not a valid Hub repo name: {problem}")
    branch = target.revision
    if target.create_pr and branch != MAIN:
        raise HubError("a pull request goes to the main branch; use --create-pr or --revision, not both")
    # The rules of Git that are easy to break by mistake; refs/ is reserved for the Hub.
    wrong = branch.endswith(("/", ".", ".lock")) or re.search(r"\.\.|//|/\.|^refs/|^[0-9a-f]{40}$", branch)
    if wrong or not re.fullmatch(r"\w[\w./-]*", branch):
        raise HubError(f"--revision {branch!r} is not a valid branch name; use letters, digits, dots, dashes or _")
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later with `prism-hf push`")
    if get_token() is None:
        raise HubError("there is no Hugging Face token, so nothing can be pushed; set HF_TOKEN, or run `hf auth login`")


def check_target(target: Target, name: str, *, pauses: Sequence[float] = SHORT) -> Target:
    """Check hours ahead of a push that it can succeed; write nothing.

    Check the name, the token and its write permission. The repo must be new, be empty or have an older version of `name`.
    In the returned target, the namespace of the user is added to a name without one.
    """
    check_here(target)
    user = again(lambda: HfApi().whoami(), "asking the Hub whose token this is", pauses)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError("the Hugging Face token can only read; get a write token at https://huggingface.co/settings/tokens")
    if not user.get("name"):
        raise HubError("the Hub does not say whose token this is; check HF_ENDPOINT and the proxy")
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{user['name']}/{target.repo_id}")
    spaces = {user["name"], *(org["name"] for org in user.get("orgs") or ())}
    again(lambda: _check_repo(Repository(target), name, spaces), f"checking {target.repo_id!r} on the Hub", pauses)
    return target


def _check_repo(repo: Repository, name: str, spaces: Collection[str]) -> None:
    target = repo.target
    if repo.info() is None:
        if target.create_pr:
            raise HubError(f"{target.repo_id!r} is not on the Hub, or not for this token; omit --create-pr to create it")
        space = target.repo_id.split("/")[0]
        if space not in spaces:
            raise HubError(f"{space!r} is neither you nor your organization; push to one of {', '.join(sorted(spaces))}")
        return
    if not target.create_pr:
        repo.api.auth_check(**repo.where, write=True)
    repo.check_visibility()
    head = repo.head(target.revision)
    if head is not None and target.revision != MAIN:
        branches = repo.api.list_repo_refs(**repo.where).branches
        if target.revision not in [branch.name for branch in branches]:
            raise HubError(f"--revision {target.revision!r} is a tag of {target.repo_id!r}; use a branch")
    head = head or repo.head(MAIN)
    if head is not None:
        repo.check_occupant(name, head)
