"""How a folder gets to the Hub: in one commit that brings all of it or nothing. The only module that writes to the network.

The branch is at every moment exactly the old version or exactly the new one. Files are sent one by one before the commit,
so that a killed push goes on where it stopped. Whatever fails for a moment is tried again from what the Hub holds then: an
answer that was lost is not published twice, and somebody else's commit in between is kept.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile
from huggingface_hub.utils import sha, validate_repo_id  # type: ignore[attr-defined]

from .bundle import LABELS, Bundle, Kind, bundle_of, name_in, stale
from .errors import HubError
from .patience import PAUSES, SHORT, again
from .readme import merge_readme
from .storage import sha256_of

log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationDelete
MAIN = "main"
_TEXT = (".json", ".yaml", ".md")
"""Small files, sent inside the commit; all others before it, one by one."""


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


@dataclass(frozen=True)
class Publication:
    """What came of it.

    Attributes:
        url: Of the commit, or of the pull request.
        commit: Its id.
        changed: Whether anything was published; if the Hub has it all already, nothing is.
    """

    url: str
    commit: str
    changed: bool


def push_folder(folder: Path, target: Target, *, dataset_id: str | None = None) -> Publication:
    """Publish a data set folder, a squeezed teacher or a student.

    Args:
        folder: What a run left.
        target: Where; its kind follows from the folder.
        dataset_id: Hub id of the data set that a student learned from, for its card.

    Raises:
        HubError: See `bundle_of`, `prepare` and `publish`.

    Example:
        >>> push_folder(Path("outputs/digits-prism-ipc10/dataset"), Target("org/digits-prism-ipc10", public=True)).url
    """
    bundle = bundle_of(folder, dataset_id=dataset_id)
    return publish(bundle, prepare(replace(target, kind=bundle.kind), bundle.name))


# -- before the work --------------------------------------------------------------------------------------------------


def prepare(target: Target, name: str, *, pauses: Sequence[float] = SHORT) -> Target:
    """Find out whether `target` can be published to, and reserve its name, hours before anything is sent.

    Checks the name, the token and its right to write, and that the repo is new, empty or holds an older version of `name`.
    A repo that is not there is made, private unless `target.public`: only that proves that it can be.

    Args:
        target: Where; a name without namespace becomes one of the user's.
        name: Of what will be published, `Bundle.name`.
        pauses: Seconds between tries of what can pass.

    Returns:
        The target with its full name.

    Raises:
        HubError: One line on what is wrong and how to put it right.
    """
    _check_words(target)
    if is_offline_mode():
        raise HubError(
            "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push the folder later with `prism-hf push`"
        )
    if get_token() is None:
        raise HubError("there is no Hugging Face token, so nothing can be pushed; set HF_TOKEN, or run `hf auth login`")
    user = again(lambda: HfApi().whoami(), "asking the Hub whose token this is", pauses)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "the Hugging Face token can only read; make one that can write at https://huggingface.co/settings/tokens"
        )
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{user['name']}/{target.repo_id}")
    spaces = {user["name"], *(org["name"] for org in user.get("orgs", ()))}
    again(lambda: _reserve(_Repo(target), name, spaces), f"checking {target.repo_id!r} on the Hub", pauses)
    return target


def _check_words(target: Target) -> None:
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise HubError(f"{target.repo_id!r} is no name of a Hub repo: {' '.join(str(error).split())}") from error
    if target.create_pr and target.revision != MAIN:
        raise HubError("a pull request goes to the main branch; give --create-pr or --revision, not both")
    branch = target.revision
    # Git's own rules, as far as they can be broken by mistake; refs/ is the Hub's.
    if (
        not re.fullmatch(r"\w[\w./-]*", branch)
        or branch.endswith(("/", ".", ".lock"))
        or re.search(r"\.\.|//|/\.|^refs/", branch)
    ):
        raise HubError(f"--revision {branch!r} is no name of a branch; use letters, digits, dots, dashes and underscores")


def _reserve(repo: _Repo, name: str, spaces: Collection[str]) -> None:
    target, info = repo.target, repo.info()
    if info is None:
        if target.create_pr:
            raise HubError(
                f"{target.repo_id!r} is not on the Hub, or not for this token; without --create-pr it would be made"
            )
        space = target.repo_id.split("/")[0]
        if space not in spaces:
            raise HubError(f"{space!r} is neither you nor your organisation; push to one of {', '.join(sorted(spaces))}")
        repo.make()
        return
    if not target.create_pr:
        repo.api.auth_check(target.repo_id, repo_type=target.kind, write=True)
        _check_visibility(target, info)
    head = repo.head(target.revision) or repo.head(MAIN)
    if head is not None:
        _check_occupant(repo, name, head)


def _check_visibility(target: Target, info: DatasetInfo | ModelInfo) -> None:
    if not target.public and info.private is False:
        raise HubError(
            f"{target.repo_id!r} is public, and a push is private unless it says --public; say so, or make the repo "
            "private in its settings first"
        )


def _check_occupant(repo: _Repo, name: str, head: str) -> None:
    """Publish over an older version of the same thing or into an empty repo, and over nothing else by accident."""
    tree = repo.tree(head)
    content = sorted(set(tree) - {".gitattributes", "README.md", "LICENSE"})
    if repo.target.replace_other or not content:
        return
    label = next((path for path in LABELS if path in tree), None)
    held = name_in(label, repo.read(tree[label], head)) if label else None
    if held != name:
        what = repr(held) if held else f"files that prism-hf did not make ({', '.join(content[:3])})"
        raise HubError(
            f"{repo.target.repo_id!r} holds {what}, not {name!r}; choose another name, or say --replace to publish over it"
        )


# -- publishing -------------------------------------------------------------------------------------------------------


def publish(bundle: Bundle, target: Target, *, pauses: Sequence[float] = PAUSES) -> Publication:
    """Bring a branch to the state of a bundle, in one commit, or in none if it is in that state.

    Args:
        bundle: What to publish.
        target: Where, from `prepare`.
        pauses: Seconds between tries of what can pass: 408, 409, 412, 425, 429, 5xx, broken connections, a rival's commit.

    Raises:
        HubError: It cannot be done (401, 403, ...), or fails still after the last try. The branch has the old version then;
            the new one if nothing but the answer was lost.

    Example:
        >>> bundle = bundle_of(Path("outputs/digits-prism-ipc10/dataset"))
        >>> publish(bundle, prepare(Target("org/digits-prism-ipc10"), bundle.name)).url
    """
    progress = _Progress({path: _Digests(local) for path, local in bundle.files.items()})
    return again(lambda: _publish_once(bundle, _Repo(target), progress), f"publishing to {target.repo_id!r}", pauses)


class _Digests:
    """The hashes of a local file that the Hub knows it by; read once."""

    def __init__(self, path: Path) -> None:
        self.sha256 = sha256_of(path)
        self._path = path

    def equal(self, there: RepoFile) -> bool:
        if there.lfs is not None:
            return there.lfs.sha256 == self.sha256
        return there.size == self._path.stat().st_size and there.blob_id == sha.git_hash(self._path.read_bytes())


@dataclass(eq=False)
class _Progress:
    """What is known from one try to the next.

    Attributes:
        digests: Of each file of the bundle.
        sent: Files that the Hub's storage has.
        tried: Whether a commit was asked for; it may have landed though its answer was lost.
    """

    digests: Mapping[str, _Digests]
    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)
    tried: bool = False


def _publish_once(bundle: Bundle, repo: _Repo, progress: _Progress) -> Publication:
    """One try, from what the Hub holds now."""
    target, info = repo.target, repo.info()
    if info is None:
        repo.make()
        info = repo.info()
        assert info is not None
    if target.create_pr:
        return _request_once(bundle, repo, progress)
    _check_visibility(target, info)
    branch = target.revision
    head = repo.head(branch)
    if head is None:
        repo.api.create_branch(target.repo_id, branch=branch, repo_type=target.kind, exist_ok=True)
        head = repo.must_have(branch)
    _check_occupant(repo, bundle.name, head)
    head = _bring_up(bundle, repo, branch, head, progress)
    if target.public and info.private:
        repo.api.update_repo_settings(target.repo_id, repo_type=target.kind, private=False)
    return Publication(repo.commit_url(head), head, progress.tried)


def _request_once(bundle: Bundle, repo: _Repo, progress: _Progress) -> Publication:
    """One try to bring it all into one pull request; none is opened if the main branch has it all."""
    main = repo.must_have(MAIN)
    _check_occupant(repo, bundle.name, main)
    if not _changes(bundle, repo, main, progress):
        return Publication(repo.commit_url(main), main, changed=False)
    request = repo.pull_request(f"Publish {bundle.name} with prism-hf")
    branch = f"refs/pr/{request.num}"
    head = _bring_up(bundle, repo, branch, repo.must_have(branch), progress)
    if request.status == "draft":
        # Shown to others now that its commit is there.
        repo.api.change_discussion_status(repo.target.repo_id, request.num, "open", repo_type=repo.target.kind)
    return Publication(request.url, head, changed=True)


def _changes(bundle: Bundle, repo: _Repo, head: str, progress: _Progress) -> list[Operation]:
    """What a commit on `head` has to do; empty if everything is there as it should be."""
    tree = repo.tree(head)
    target = repo.target
    theirs = repo.read(tree["README.md"], head).decode(errors="surrogateescape") if "README.md" in tree else None
    branch = None if target.revision == MAIN else target.revision
    readme = merge_readme(bundle.readme(target.repo_id, branch), theirs, owned=bundle.owned_keys)
    changes: list[Operation] = [
        progress.sent.get(path) or CommitOperationAdd(path, local)
        for path, local in bundle.files.items()
        if path not in tree or not progress.digests[path].equal(tree[path])
    ]
    if readme != theirs:
        changes.append(CommitOperationAdd("README.md", readme.encode(errors="surrogateescape")))
    return [*changes, *(CommitOperationDelete(path, is_folder=False) for path in stale(bundle, tree))]


def _bring_up(bundle: Bundle, repo: _Repo, branch: str, head: str, progress: _Progress) -> str:
    """Send what a branch lacks, file by file, then the commit, which counts only if the branch is still at `head`."""
    target, changes = repo.target, _changes(bundle, repo, head, progress)
    if not changes:
        log.info("%s has it all%s", target.repo_id, "" if progress.tried else ": nothing to publish")
        return head
    for change in changes:
        if isinstance(change, CommitOperationAdd) and not change.path_in_repo.endswith(_TEXT):
            log.info("sending %s (%.1f MB)", change.path_in_repo, change.upload_info.size / 1e6)
            repo.api.preupload_lfs_files(
                target.repo_id, [change], repo_type=target.kind, revision=branch, free_memory=False
            )
            progress.sent[change.path_in_repo] = change
    progress.tried = True
    log.info("committing %d changes to %s", len(changes), target.repo_id)
    done = repo.api.create_commit(
        target.repo_id,
        changes,
        commit_message=f"Publish {bundle.name} with prism-hf",
        repo_type=target.kind,
        revision=branch,
        parent_commit=head,
    )
    return str(done.oid)


class _Repo:
    """What the Hub holds at a target, as of now.

    Args:
        target: Which repo.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.api = target, HfApi()

    def make(self) -> None:
        """Make the repo; one that has appeared meanwhile is fine."""
        self.api.create_repo(self.target.repo_id, repo_type=self.target.kind, private=not self.target.public, exist_ok=True)

    def info(self, revision: str | None = None) -> DatasetInfo | ModelInfo | None:
        """What the Hub says of the repo, or `None` if it is not there."""
        try:
            info = self.api.repo_info(self.target.repo_id, repo_type=self.target.kind, revision=revision)
        except RepositoryNotFoundError:
            return None
        assert isinstance(info, DatasetInfo | ModelInfo)
        return info

    def head(self, revision: str) -> str | None:
        """The commit that a branch is at, or `None` if there is no such branch."""
        try:
            info = self.info(revision)
        except RevisionNotFoundError:
            return None
        return info.sha if info else None

    def must_have(self, revision: str) -> str:
        """The commit that a branch is at, which is there."""
        head = self.head(revision)
        if head is None:
            raise HubError(f"{self.target.repo_id!r} has no branch {revision!r}; was it removed just now?")
        return head

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """All files of a commit."""
        found = self.api.list_repo_tree(self.target.repo_id, recursive=True, revision=commit, repo_type=self.target.kind)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def read(self, file: RepoFile, commit: str) -> bytes:
        """The content of a small file, checked against the tree: downloads look at the size alone."""
        with tempfile.TemporaryDirectory() as place:
            local = self.api.hf_hub_download(
                self.target.repo_id, file.path, repo_type=self.target.kind, revision=commit, cache_dir=place
            )
            if not _Digests(Path(local)).equal(file):
                raise ConnectionError(f"{file.path} arrived with other content than the Hub lists")
            return Path(local).read_bytes()

    def commit_url(self, commit: str) -> str:
        """Where a commit can be looked at."""
        prefix = "datasets/" if self.target.kind == "dataset" else ""
        return f"{self.api.endpoint}/{prefix}{self.target.repo_id}/commit/{commit}"

    def pull_request(self, title: str) -> Discussion:
        """Our own unfinished pull request of that title, or a new one: a killed push goes on in the one that it opened."""
        repo_id, kind, mine = self.target.repo_id, self.target.kind, self.api.whoami(cache=True)["name"]
        for found in self.api.get_repo_discussions(repo_id, repo_type=kind, author=mine, discussion_type="pull_request"):
            if found.title == title and found.author == mine and found.status in ("draft", "open"):
                return found
        return self.api.create_pull_request(repo_id, repo_type=kind, title=title)
