# ruff: noqa: F811
"""Every kind of request with every kind of fault: the branch stays old, or becomes new in a single commit."""

import random
from dataclasses import dataclass, field
from functools import partial

import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import CutBody, Delay, LostAnswer, Reset, ResetMidBody, Rival, Status
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import _xet
from pipeline import add_card, small_set

from prism_hf.errors import HubError
from prism_hf.hub.bundle import bundle_of
from prism_hf.hub.push import publish
from prism_hf.hub.repository import Target
from prism_hf.runtime.hub_client import HUB_ERRORS

REPO, KIND = "org/small", "datasets"
NOTE = "a note of somebody else"
# Requests of one publication, by transport. Those in LATER are sent more than once, and later ones fail too.
SHARED = ("repo_info", "tree", "resolve", "validate_yaml", "preupload", "commit")
OWN = {"lfs": ("lfs_batch", "lfs_put", "lfs_verify"), "xet": ("xet_token", "xet_xorb", "xet_shard")}
LATER = ("repo_info", "preupload", "lfs_put", "xet_xorb")
WITH_BODY = ("validate_yaml", "preupload", "commit", "lfs_batch", "lfs_put", "lfs_verify", "xet_xorb", "xet_shard")
PASSING = {
    "502 html": Status(502, b"<html>bad gateway</html>", html=True), "503": Status(503),
    "429": Status(429, headers={"Retry-After": "0"}), "408": Status(408),
    "reset": Reset(), "lost answer": LostAnswer(), "cut, closed": CutBody(3), "cut, reset": CutBody(3, rst=True),
    "delay": Delay(0.05),
}  # fmt: skip
LASTING = {"401": Status(401), "403": Status(403), "503 for ever": Status(503)}
RIVALS = {"rival file": {"notes.md": b"mine"}, "rival readme": None, "rival table": {"data/train-extra.parquet": b"other"}}


@dataclass
class Case:
    """One fault in one kind of request."""

    kind: str
    name: str
    first: bool = False
    skip: int = 0
    action: object = None
    lasts: bool = False

    @property
    def id(self):
        return f"{'first' if self.first else 'again'}-{self.kind}-{self.skip}-{self.name}".replace(" ", "_")


def cases(way):
    kinds = SHARED + OWN[way]
    for first in (False, True):
        for kind in (*kinds, "create_repo") if first else kinds:
            # A new repository has no README to read.
            if first and kind == "resolve":
                continue
            for name, action in PASSING.items():
                yield Case(kind, name, first, 0, action)
                if kind in LATER and not first and name in ("503", "reset", "lost answer"):
                    yield Case(kind, name, first, 1, action)
            if kind in WITH_BODY:
                yield Case(kind, "reset in the body", first, 0, ResetMidBody(10))
            for name, action in LASTING.items():
                # On the second try, storage reports that it has the object, so no confirmation is needed.
                yield Case(kind, name, first, 0, action, lasts=(kind, name) != ("lfs_verify", "503 for ever"))
            if not first and kind not in ("xet_token", "xet_xorb", "xet_shard", "lfs_put"):
                yield from (Case(kind, name) for name in RIVALS)
    for name in ("409", "412", "425", "500", "504"):
        yield Case("commit", name, action=Status(int(name)))


ALL = {way: list(cases(way)) for way in OWN}


def marked(way):
    """Yield all cases, with most marked slow; the others cover each request (new and old repository) and each fault."""
    seen = set()
    for case in random.Random(0).sample(ALL[way], len(ALL[way])):
        facts = {(case.first, case.kind), (case.kind, case.skip), case.name}
        yield case if facts - seen else pytest.param(case, marks=pytest.mark.slow)
        seen |= facts


@dataclass
class World:
    """The allowed states of the branch: its files before and after."""

    old: object
    new: object
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two versions of one dataset; the older has more shards."""
    folders = []
    for version, shard_mb, epochs in ((1, 1, 3), (2, 500, 2)):
        folder = tmp_path_factory.mktemp(f"version-{version}")
        recipe, names, *_ = small_set(folder, seed=version, epochs=epochs, shard_mb=shard_mb)
        add_card(folder, recipe, names)
        folders.append(folder)
    shard = folders[0] / "data" / "train-00000-of-00001.parquet"
    assert shard.is_file()
    return World(*map(bundle_of, folders))


def state(hub, revision="main"):
    return {path: data for path, data in hub.files(KIND, REPO, revision).items() if path != ".gitattributes"}


def clean(hub, bundle):
    """Return the files of a repository after a publication without faults."""
    publish(bundle, Target(REPO, public=True), pauses=())
    files = state(hub)
    HfApi().delete_repo(REPO, repo_type="dataset")
    return files


@pytest.fixture
def world(sets, connected, monkeypatch, tmp_path):
    if not sets.before:
        sets.before = clean(connected, sets.old)
        # A shard that the new version does not have, as left by an older version with more shards.
        sets.before["data/train-00001-of-00002.parquet"] = b"PAR1 old PAR1"
        sets.after = clean(connected, sets.new)
        # The test that comes first must find an empty server too, and a client that remembers no upload.
        connected.reset()
        connected.add_user("ann", token="hf_secret_token", orgs=("org",))
        _xet._GLOBAL_XET_HOLDER = _xet.XetSessionHolder()
        _xet.XET_CONNECTION_INFO_CACHE.clear()
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-2"))
    return sets


def rival_act(hub, name):
    if name == "rival readme":
        text = hub.files(KIND, REPO)["README.md"] + f"\n{NOTE}\n".encode()
        return partial(hub.commit, KIND, REPO, {"README.md": text})
    return partial(hub.commit, KIND, REPO, RIVALS[name])


def allowed(world, case):
    """Return the allowed states of the branch: old or new, each with or without the rival's addition."""
    old = {} if case.first else world.before
    for state, is_new in ((old, False), (world.after, True)):
        yield state
        if case.name == "rival file":
            yield state | RIVALS[case.name]
        if case.name == "rival table" and not is_new:
            yield state | RIVALS[case.name]
        if case.name == "rival readme" and state:
            yield state | {"README.md": state["README.md"] + f"\n{NOTE}\n".encode()}


def check(hub, world, case, run):
    """Publish with one fault and return the broken guarantees (empty on success)."""
    if not case.first:
        hub.create(KIND, REPO, world.before)
    start = len(hub.history(KIND, REPO)) if hub.exists(KIND, REPO) else 1
    action = case.action or Rival(rival_act(hub, case.name))
    hub.fault(case.kind, action, skip=case.skip, times=None if case.lasts else 1)
    error = None
    try:
        run()
    except HubError as caught:
        error = caught
    except (OSError, RuntimeError, ValueError) as caught:
        return [f"an error that is not ours: {caught!r}"]
    if not hub.fired:
        return ["the fault never struck"]
    broken = []
    states = list(allowed(world, case))
    oids = hub.history(KIND, REPO) if hub.exists(KIND, REPO) else []
    for oid in oids[: len(oids) - start + 1]:
        if state(hub, oid) not in states:
            broken.append("a commit is neither the old version nor the new one")
    rivals = 0 if case.action else 1
    if len(oids) - start > 1 + rivals:
        broken.append(f"{len(oids) - start - rivals} commits of ours")
    if not case.lasts:
        now = state(hub)
        missing = [path for path, data in world.after.items() if path != "README.md" and now.get(path) != data]
        if error or missing:
            broken.append(f"a fault that passes did not pass: {error or missing}")
        if "data/train-00001-of-00002.parquet" in now or "data/train-extra.parquet" in now:
            broken.append("an old table stayed")
        if case.name == "rival readme" and NOTE.encode() not in now["README.md"]:
            broken.append("a rival's words were lost")
        if case.name == "rival file" and now.get("notes.md") != b"mine":
            broken.append("a rival's file was lost")
    elif error is None:
        broken.append("a fault that lasts went unnoticed")
    elif "\n" in str(error) or "hf_secret_token" in str(error):
        broken.append(f"not one line without the token: {error}")
    return broken


def ours(world):
    publish(world.new, Target(REPO, public=True), pauses=(0, 0, 0))


@pytest.mark.parametrize("case", list(marked("lfs")), ids=lambda case: case.id)
@pytest.mark.parametrize("transport", ["lfs"], indirect=True)
def test_a_fault_leaves_the_old_or_the_new_version_with_lfs(hub, world, case):
    assert check(hub, world, case, partial(ours, world)) == []


@pytest.mark.parametrize("case", list(marked("xet")), ids=lambda case: case.id)
@pytest.mark.parametrize("transport", ["xet"], indirect=True)
def test_a_fault_leaves_the_old_or_the_new_version_with_xet(hub, world, case):
    assert check(hub, world, case, partial(ours, world)) == []


def test_there_are_at_least_180_cases_per_transport():
    assert {way: len(found) >= 180 for way, found in ALL.items()} == {"lfs": True, "xet": True}


def naive(world):
    """Publish without regard to faults: first the data, then the card, in separate commits."""
    api, bundle = HfApi(), world.new
    api.create_repo(REPO, repo_type="dataset", exist_ok=True)
    files = [CommitOperationAdd(path, entry.source) for path, entry in bundle.files.items()]
    card = CommitOperationAdd("README.md", bundle.readme(REPO, None).encode())
    try:
        for operations in (files, [card]):
            api.create_commit(REPO, operations, commit_message="naive", repo_type="dataset")
    except HUB_ERRORS as error:
        raise HubError("what it raised does not matter here") from error


@pytest.mark.parametrize("transport", ["lfs"], indirect=True)
def test_the_matrix_catches_a_naive_publisher(hub, world):
    caught = {}
    for case in (case for case in ALL["lfs"] if case.kind in ("commit", "validate_yaml")):
        hub.reset()
        hub.add_user("ann", token="hf_secret_token", orgs=("org",))
        caught[case.id] = check(hub, world, case, partial(naive, world))
    half = [id for id, broken in caught.items() if any("neither" in line for line in broken)]
    assert len(half) > 20, caught
