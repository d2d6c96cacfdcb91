"""Push: a folder gets to the Hub in one commit, all of it or nothing. The only module that writes to the network.

The branch is at every moment exactly the old version or exactly the new one. Files are sent one by one before the commit,
so that a killed push goes on where it stopped. Whatever fails for a moment is tried again from what the Hub holds then: an
answer that was lost is not published twice, and somebody else's commit in between is kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetInfo, ModelInfo

from ..errors import HubError
from ..runtime import PAUSES, SHORT, again
from .bundle import Bundle, bundle_of, stale
from .merge import merge_readme
from .repository import MAIN, Repository, Target, check_here, check_target

log = logging.getLogger(__name__)
TITLE = "Publish {} with prism-hf"
Operation = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class Publication:
    """The URL of a commit or of a pull request, the commit's id, and whether anything had to be published."""

    url: str
    commit: str
    changed: bool


def push_folder(folder: Path, target: Target, *, dataset_id: str | None = None) -> Publication:
    """Publish a dataset folder, a squeezed teacher or a student (for its card: of the dataset `dataset_id`).

    The kind of the target follows from the folder.

    Raises:
        HubError: The folder cannot be published, or not there; see `publish`.

    Example:
        >>> push_folder(Path("outputs/digits-prism-ipc10/dataset"), Target("org/digits-prism-ipc10", public=True)).url
    """
    check_here(target)
    bundle = bundle_of(folder, dataset_id=dataset_id)
    return publish(bundle, check_target(replace(target, kind=bundle.kind), bundle.name))


def reserve(target: Target, *, pauses: Sequence[float] = SHORT) -> None:
    """Make the repo if it is not there, empty and private: only that proves that it can be made, and keeps its name."""
    again(lambda: _made(Repository(target)), f"making {target.repo_id!r} on the Hub", pauses)


def publish(bundle: Bundle, target: Target, *, pauses: Sequence[float] = PAUSES) -> Publication:
    """Bring a branch, of a target from `check_target`, to the state of a bundle: in one commit, or in none if it is there.

    What can pass is tried again, after so many seconds: 408, 409, 412, 425, 429, 5xx, broken connections, a rival's commit.

    Raises:
        HubError: It cannot be done (401, 403, ...), or fails still after the last try. The branch has the old version then;
            the new one if nothing but the answer was lost.
    """
    tries = _Tries()
    return again(lambda: _publish_once(bundle, Repository(target), tries), f"publishing to {target.repo_id!r}", pauses)


@dataclass(eq=False)
class _Tries:
    """What is known from one try to the next."""

    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)  # files that the Hub's storage has
    committed: bool = False  # whether a commit was asked for; it may have landed though its answer was lost


def _made(repo: Repository) -> DatasetInfo | ModelInfo:
    """The repo, made if it is not there: private until its data are there; one that has appeared meanwhile is fine."""
    info = repo.info()
    if info is None:
        repo.api.create_repo(**repo.where, private=True, exist_ok=True)
        info = repo.info()
    if info is None:
        raise HubError(f"{repo.target.repo_id!r} is there, but not for this token; choose another name, or another token")
    return info


def _publish_once(bundle: Bundle, repo: Repository, tries: _Tries) -> Publication:
    """One try, from what the Hub holds now."""
    target, info = repo.target, _made(repo)
    branch = target.revision
    head = repo.head(branch)
    if head is None:
        repo.api.create_branch(**repo.where, branch=branch, exist_ok=True)
        head = repo.must_have(branch)
    repo.check_occupant(bundle.name, head)
    if target.create_pr:
        return _request_once(bundle, repo, head, tries)
    head = _bring_up(bundle, repo, branch, head, tries)
    if target.public and info.private:
        repo.api.update_repo_settings(**repo.where, private=False)
    return Publication(repo.commit_url(head), head, tries.committed)


def _request_once(bundle: Bundle, repo: Repository, main: str, tries: _Tries) -> Publication:
    """One try to bring it all into one pull request; none is opened if the main branch, at `main`, has it all."""
    if not _changes(bundle, repo, main, tries):
        return Publication(repo.commit_url(main), main, changed=False)
    repo.check_visibility()
    title, user = TITLE.format(bundle.name), repo.api.whoami(cache=True)["name"]
    requests = repo.api.get_repo_discussions(**repo.where, author=user, discussion_type="pull_request")
    # A killed push goes on in the pull request that it opened.
    ours = (each for each in requests if (each.title, each.author) == (title, user) and each.status in ("draft", "open"))
    request = next(ours, None) or repo.api.create_pull_request(**repo.where, title=title)
    branch = f"refs/pr/{request.num}"
    head = _bring_up(bundle, repo, branch, repo.must_have(branch), tries)
    if request.status == "draft":
        # Others may see it now that its commit is there.
        repo.api.change_discussion_status(**repo.where, discussion_num=request.num, new_status="open")
    return Publication(request.url, head, changed=True)


def _changes(bundle: Bundle, repo: Repository, head: str, tries: _Tries) -> list[Operation]:
    """What a commit on `head` has to do; empty if everything is there as it should be."""
    tree, target = repo.tree(head), repo.target
    theirs = repo.read(tree["README.md"], head) if "README.md" in tree else None
    branch = None if target.revision == MAIN else target.revision
    readme = merge_readme(bundle.readme(target.repo_id, branch), theirs, owned=bundle.owned_keys)
    changes: list[Operation] = [
        tries.sent.get(path) or CommitOperationAdd(path, entry.source)
        for path, entry in bundle.files.items()
        if path not in tree or not entry.equal(tree[path])
    ]
    if readme != theirs:
        changes.append(CommitOperationAdd("README.md", readme))
    return [*changes, *(CommitOperationDelete(path, is_folder=False) for path in stale(bundle, tree))]


def _bring_up(bundle: Bundle, repo: Repository, branch: str, head: str, tries: _Tries) -> str:
    """Send what a branch lacks, file by file, then the commit, which counts only if the branch is still at `head`."""
    target, changes = repo.target, _changes(bundle, repo, head, tries)
    if not changes:
        log.info("%s has it all%s", target.repo_id, "" if tries.committed else ": nothing to publish")
        return head
    additions = [change for change in changes if isinstance(change, CommitOperationAdd)]
    for addition in additions:
        if isinstance(addition.path_or_fileobj, str):
            log.info("sending %s (%.1f MB)", addition.path_in_repo, addition.upload_info.size / 1e6)
            _send(repo, [addition], branch)
            if not bundle.files[addition.path_in_repo].intact():
                raise HubError(f"{addition.path_in_repo} was changed while it was being sent; push again later")
            tries.sent[addition.path_in_repo] = addition
    _send(repo, [addition for addition in additions if isinstance(addition.path_or_fileobj, bytes)], branch)
    # The library leaves files that the repo's .gitignore matches out of the commit, without a word.
    ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
    if ignored:
        raise HubError(f"the .gitignore in {target.repo_id!r} keeps {ignored[0]} out; remove that line from it")
    repo.check_visibility()
    tries.committed = True
    log.info("committing %d changes to %s", len(changes), target.repo_id)
    done = repo.api.create_commit(
        **repo.where, operations=changes, commit_message=TITLE.format(bundle.name), revision=branch, parent_commit=head
    )
    return str(done.oid)


def _send(repo: Repository, additions: list[CommitOperationAdd], branch: str) -> None:
    """Bring files into the Hub's storage, and learn how the Hub wants each of them."""
    repo.api.preupload_lfs_files(**repo.where, additions=additions, revision=branch, free_memory=False)
