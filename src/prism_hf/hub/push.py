"""Push: a folder gets to the Hub in one commit, all of it or nothing. The only module that writes to the network.

The branch is at every moment exactly the old version or exactly the new one. Files are sent one by one before the commit,
so that a killed push goes on where it stopped. Whatever fails for a moment is tried again from what the Hub holds then: an
answer that was lost is not published twice, and somebody else's commit in between is kept.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import HubError
from ..runtime.hub_client import PAUSES, SHORT, again
from .bundle import LABELS, Bundle, bundle_of, name_in, stale
from .merge import merge_readme
from .repository import MAIN, RepoInfo, Repository, Target

log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class Publication:
    """The URL of a commit or of a pull request, the commit's id, and whether anything had to be published."""

    url: str
    commit: str
    changed: bool


def push_folder(folder: Path, target: Target, *, dataset_id: str | None = None) -> Publication:
    """Publish a dataset folder, a squeezed teacher or a student.

    Args:
        folder: What a run left.
        target: Where; its kind follows from the folder.
        dataset_id: Hub id of the dataset that a student learned from, for its card.

    Raises:
        HubError: See `bundle_of`, `check_target` and `publish`.

    Example:
        >>> push_folder(Path("outputs/digits-prism-ipc10/dataset"), Target("org/digits-prism-ipc10", public=True)).url
    """
    check_here(target)
    bundle = bundle_of(folder, dataset_id=dataset_id)
    return publish(bundle, check_target(replace(target, kind=bundle.kind), bundle.name))


# -- before the work --------------------------------------------------------------------------------------------------


def check_here(target: Target) -> None:
    """Find out what is wrong with a target without asking the Hub: name, branch, token, offline mode.

    Raises:
        HubError: One line on what is wrong and how to put it right.
    """
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise HubError(f"{target.repo_id!r} is no name of a Hub repo: {' '.join(str(error).split())}") from error
    branch = target.revision
    if target.create_pr and branch != MAIN:
        raise HubError("a pull request goes to the main branch; give --create-pr or --revision, not both")
    # Git's own rules, as far as they can be broken by mistake; refs/ is the Hub's.
    wrong = branch.endswith(("/", ".", ".lock")) or re.search(r"\.\.|//|/\.|^refs/|^[0-9a-f]{40}$", branch)
    if wrong or not re.fullmatch(r"\w[\w./-]*", branch):
        raise HubError(f"--revision {branch!r} is no name of a branch; use letters, digits, dots, dashes and underscores")
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later with `prism-hf push`")
    if get_token() is None:
        raise HubError("there is no Hugging Face token, so nothing can be pushed; set HF_TOKEN, or run `hf auth login`")


def check_target(target: Target, name: str, *, pauses: Sequence[float] = SHORT) -> Target:
    """Find out whether a target can be published to, hours before anything is sent; writes nothing.

    Checks the name, the token and its right to write, and that the repo is new, empty or holds an older version of `name`.

    Args:
        target: Where; a name without namespace becomes one of the user's in what is returned.
        name: Of what will be published, `Bundle.name`.
        pauses: Seconds between tries of what can pass.

    Raises:
        HubError: One line on what is wrong and how to put it right.
    """
    check_here(target)
    user = again(lambda: HfApi().whoami(), "asking the Hub whose token this is", pauses)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            "the Hugging Face token can only read; make one that can write at https://huggingface.co/settings/tokens"
        )
    if not user.get("name"):
        raise HubError("the Hub does not say whose token this is; check HF_ENDPOINT and the proxy")
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{user['name']}/{target.repo_id}")
    spaces = {user["name"], *(org["name"] for org in user.get("orgs") or ())}
    again(lambda: _check_repo(Repository(target), name, spaces), f"checking {target.repo_id!r} on the Hub", pauses)
    return target


def reserve(target: Target, *, pauses: Sequence[float] = SHORT) -> None:
    """Make the repo if it is not there, empty and private: only that proves that it can be made, and keeps the name free.

    Raises:
        HubError: One line on why it cannot be made.
    """
    again(lambda: _made(Repository(target)), f"making {target.repo_id!r} on the Hub", pauses)


def _check_repo(repo: Repository, name: str, spaces: Collection[str]) -> None:
    target = repo.target
    if repo.info() is None:
        if target.create_pr:
            raise HubError(
                f"{target.repo_id!r} is not on the Hub, or not for this token; without --create-pr it would be made"
            )
        space = target.repo_id.split("/")[0]
        if space not in spaces:
            raise HubError(f"{space!r} is neither you nor your organisation; push to one of {', '.join(sorted(spaces))}")
        return
    if not target.create_pr:
        repo.api.auth_check(target.repo_id, repo_type=target.kind, write=True)
    repo.check_visibility()
    head = repo.head(target.revision)
    if head is not None and target.revision != MAIN:
        branches = repo.api.list_repo_refs(target.repo_id, repo_type=target.kind).branches
        if target.revision not in [branch.name for branch in branches]:
            raise HubError(f"--revision {target.revision!r} is a tag of {target.repo_id!r}; name a branch")
    head = head or repo.head(MAIN)
    if head is not None:
        _check_occupant(repo, name, head)


def _check_occupant(repo: Repository, name: str, head: str) -> None:
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
        target: Where, from `check_target`.
        pauses: Seconds between tries of what can pass: 408, 409, 412, 425, 429, 5xx, broken connections, a rival's commit.

    Raises:
        HubError: It cannot be done (401, 403, ...), or fails still after the last try. The branch has the old version then;
            the new one if nothing but the answer was lost.

    Example:
        >>> bundle = bundle_of(Path("outputs/digits-prism-ipc10/dataset"))
        >>> publish(bundle, check_target(Target("org/digits-prism-ipc10"), bundle.name)).url
    """
    tries = _Tries()
    return again(lambda: _publish_once(bundle, Repository(target), tries), f"publishing to {target.repo_id!r}", pauses)


@dataclass(eq=False)
class _Tries:
    """What is known from one try to the next.

    Attributes:
        sent: Files that the Hub's storage has.
        committed: Whether a commit was asked for; it may have landed though its answer was lost.
    """

    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)
    committed: bool = False


def _publish_once(bundle: Bundle, repo: Repository, tries: _Tries) -> Publication:
    """One try, from what the Hub holds now."""
    target, info = repo.target, _made(repo)
    if target.create_pr:
        return _request_once(bundle, repo, tries)
    branch = target.revision
    head = repo.head(branch)
    if head is None:
        repo.api.create_branch(target.repo_id, branch=branch, repo_type=target.kind, exist_ok=True)
        head = repo.must_have(branch)
    _check_occupant(repo, bundle.name, head)
    head = _bring_up(bundle, repo, branch, head, tries)
    if target.public and info.private:
        repo.api.update_repo_settings(target.repo_id, repo_type=target.kind, private=False)
    return Publication(repo.commit_url(head), head, tries.committed)


def _request_once(bundle: Bundle, repo: Repository, tries: _Tries) -> Publication:
    """One try to bring it all into one pull request; none is opened if the main branch has it all."""
    main = repo.must_have(MAIN)
    _check_occupant(repo, bundle.name, main)
    if not _changes(bundle, repo, main, tries):
        return Publication(repo.commit_url(main), main, changed=False)
    repo.check_visibility()
    request = _pull_request(repo, f"Publish {bundle.name} with prism-hf")
    branch = f"refs/pr/{request.num}"
    head = _bring_up(bundle, repo, branch, repo.must_have(branch), tries)
    if request.status == "draft":
        # Others may see it now that its commit is there.
        repo.api.change_discussion_status(repo.target.repo_id, request.num, "open", repo_type=repo.target.kind)
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
        target.repo_id,
        changes,
        commit_message=f"Publish {bundle.name} with prism-hf",
        repo_type=target.kind,
        revision=branch,
        parent_commit=head,
    )
    return str(done.oid)


def _made(repo: Repository) -> RepoInfo:
    """The repo, made if it is not there: private until its data are there; one that has appeared meanwhile is fine."""
    target, info = repo.target, repo.info()
    if info is None:
        repo.api.create_repo(target.repo_id, repo_type=target.kind, private=True, exist_ok=True)
        info = repo.info()
    if info is None:
        raise HubError(f"{target.repo_id!r} is there, but not for this token; choose another name, or another token")
    return info


def _send(repo: Repository, additions: list[CommitOperationAdd], branch: str) -> None:
    """Bring files into the Hub's storage, and learn how the Hub wants each of them."""
    repo_id, kind = repo.target.repo_id, repo.target.kind
    repo.api.preupload_lfs_files(repo_id, additions, repo_type=kind, revision=branch, free_memory=False)


def _pull_request(repo: Repository, title: str) -> Discussion:
    """Our own unfinished pull request of that title, or a new one: a killed push goes on in the one that it opened."""
    repo_id, kind, mine = repo.target.repo_id, repo.target.kind, repo.api.whoami(cache=True)["name"]
    for request in repo.api.get_repo_discussions(repo_id, repo_type=kind, author=mine, discussion_type="pull_request"):
        if request.title == title and request.author == mine and request.status in ("draft", "open"):
            return request
    return repo.api.create_pull_request(repo_id, repo_type=kind, title=title)
