"""Push a folder to the Hub in a single commit. This is the only module that writes to the network.

At any moment the branch has either the complete old version or the complete new one. Files are uploaded one by one before
the commit, so that a killed push can resume. After a temporary failure, the push reads the state of the Hub again before it
retries: a commit whose response was lost is not made twice, and a commit by somebody else in between is kept.
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
    """The result of a push: the URL of the commit or pull request, the commit id, and whether anything changed."""

    url: str
    commit: str
    changed: bool


def push_folder(folder: Path, target: Target, *, dataset_id: str | None = None) -> Publication:
    """Publish a dataset folder, a squeezed teacher or a student (`dataset_id`: its dataset on the Hub, for the card).

    The folder determines the kind of the repo.

    Raises:
        HubError: The folder cannot be published, or not to this target; see `publish`.

    Example:
        >>> push_folder(Path("outputs/digits-prism-ipc10/dataset"), Target("org/digits-prism-ipc10", public=True)).url
    """
    check_here(target)
    bundle = bundle_of(folder, dataset_id=dataset_id)
    return publish(bundle, check_target(replace(target, kind=bundle.kind), bundle.name))


def reserve(target: Target, *, pauses: Sequence[float] = SHORT) -> None:
    """Create a missing repo, empty and private: this reserves its name and is the only proof that it can be created."""
    again(lambda: _created(Repository(target)), f"creating {target.repo_id!r} on the Hub", pauses)


def publish(bundle: Bundle, target: Target, *, pauses: Sequence[float] = PAUSES) -> Publication:
    """Bring a branch to the state of a bundle in one commit, or in none if it is up to date; see `check_target`.

    Retried after `pauses` (in seconds): 408, 409, 412, 425, 429, 5xx, broken connections, and commits by others.

    Raises:
        HubError: The failure is permanent (401, 403, ...), or the last retry failed. The branch then has the old version,
            or the new one if only the response to the commit was lost.
    """
    tries = _Tries()
    return again(lambda: _publish_once(bundle, Repository(target), tries), f"publishing to {target.repo_id!r}", pauses)


@dataclass(eq=False)
class _Tries:
    """State that is kept from one try to the next."""

    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)  # files that are in the storage of the Hub
    committed: bool = False  # a commit was requested; it may exist even if the response was lost


def _created(repo: Repository) -> DatasetInfo | ModelInfo:
    """Return the repo; create it if it is missing, private until its data is there. Another process may create it too."""
    info = repo.info()
    if info is None:
        repo.api.create_repo(**repo.where, private=True, exist_ok=True)
        info = repo.info()
    if info is None:
        raise HubError(f"{repo.target.repo_id!r} exists, but not for this token; use another name or another token")
    return info


def _publish_once(bundle: Bundle, repo: Repository, tries: _Tries) -> Publication:
    """Try to publish once, starting from the current state of the Hub."""
    target, info = repo.target, _created(repo)
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
    """Try once to publish in one pull request; open none if the commit `main` of the main branch is up to date."""
    if not _changes(bundle, repo, main, tries):
        return Publication(repo.commit_url(main), main, changed=False)
    repo.check_visibility()
    title, user = TITLE.format(bundle.name), repo.api.whoami(cache=True)["name"]
    requests = repo.api.get_repo_discussions(**repo.where, author=user, discussion_type="pull_request")
    # A push that was killed resumes in the pull request that it opened.
    ours = (each for each in requests if (each.title, each.author) == (title, user) and each.status in ("draft", "open"))
    request = next(ours, None) or repo.api.create_pull_request(**repo.where, title=title)
    branch = f"refs/pr/{request.num}"
    head = _bring_up(bundle, repo, branch, repo.must_have(branch), tries)
    if request.status == "draft":
        # Show it to others, now that it has its commit.
        repo.api.change_discussion_status(**repo.where, discussion_num=request.num, new_status="open")
    return Publication(request.url, head, changed=True)


def _changes(bundle: Bundle, repo: Repository, head: str, tries: _Tries) -> list[Operation]:
    """Return the operations of a commit on top of `head`; empty if everything is up to date."""
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
    """Upload missing files one by one, then commit; the Hub rejects the commit unless the branch is still at `head`."""
    target, changes = repo.target, _changes(bundle, repo, head, tries)
    if not changes:
        log.info("%s is up to date%s", target.repo_id, "" if tries.committed else ": nothing to publish")
        return head
    additions = [change for change in changes if isinstance(change, CommitOperationAdd)]
    for addition in additions:
        if isinstance(addition.path_or_fileobj, str):
            log.info("uploading %s (%.1f MB)", addition.path_in_repo, addition.upload_info.size / 1e6)
            _send(repo, [addition], branch)
            if not bundle.files[addition.path_in_repo].intact():
                raise HubError(f"{addition.path_in_repo} changed while it was being uploaded; push again later")
            tries.sent[addition.path_in_repo] = addition
    _send(repo, [addition for addition in additions if isinstance(addition.path_or_fileobj, bytes)], branch)
    # huggingface_hub silently leaves files that the .gitignore of the repo matches out of the commit.
    ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
    if ignored:
        raise HubError(f"the .gitignore in {target.repo_id!r} excludes {ignored[0]}; remove the line that matches it")
    repo.check_visibility()
    tries.committed = True
    log.info("committing %d changes to %s", len(changes), target.repo_id)
    done = repo.api.create_commit(
        **repo.where, operations=changes, commit_message=TITLE.format(bundle.name), revision=branch, parent_commit=head
    )
    return str(done.oid)


def _send(repo: Repository, additions: list[CommitOperationAdd], branch: str) -> None:
    """Upload files to the storage of the Hub, which also decides how each file is stored."""
    repo.api.preupload_lfs_files(**repo.where, additions=additions, revision=branch, free_memory=False)
