# ruff: noqa: F811
import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import Status

from prism_hf.errors import HubError
from prism_hf.hub.repository import Repository, Target

SET = "org/set"
pytestmark = pytest.mark.parametrize("transport", ["lfs"], indirect=True)


@pytest.fixture
def repository(connected):
    connected.create("datasets", SET, {"README.md": b"hello", "data/train-0.parquet": b"PAR1"})
    return Repository(Target(SET, public=True))


def test_existing_content_is_found(connected, repository):
    head = connected.history("datasets", SET)[0]
    assert repository.info().sha == repository.head("main") == repository.must_have("main") == head
    tree = repository.tree(head)
    assert set(tree) == {".gitattributes", "README.md", "data/train-0.parquet"}
    assert repository.read(tree["README.md"], head) == b"hello"
    assert repository.read(tree["data/train-0.parquet"], head) == b"PAR1"
    assert repository.commit_url(head) == f"{connected.url}/datasets/{SET}/commit/{head}"
    assert Repository(Target("org/net", "model")).commit_url("x") == f"{connected.url}/org/net/commit/x"


def test_missing_content_is_none(connected, repository):
    assert Repository(Target("org/nothing")).info() is None
    assert Repository(Target("org/nothing")).head("main") is None
    assert repository.head("nothing") is None
    with pytest.raises(HubError, match="no branch"):
        repository.must_have("nothing")


def test_a_flipped_bit_is_not_accepted_as_the_file_that_the_hub_lists(connected, repository):
    head = connected.history("datasets", SET)[0]
    connected.corrupt("datasets", SET, "README.md")
    with pytest.raises(ConnectionError, match="other content"):
        repository.read(repository.tree(head)["README.md"], head)


@pytest.mark.parametrize(
    ("private", "public", "fine"), [(True, False, True), (True, True, True), (False, True, True), (False, False, False)]
)
def test_a_public_repo_requires_the_public_option(connected, private, public, fine):
    connected.create("datasets", SET, private=private)
    repository = Repository(Target(SET, public=public))
    if fine:
        return repository.check_visibility()
    with pytest.raises(HubError, match="--public"):
        repository.check_visibility()


def test_a_refusal_is_not_mistaken_for_a_missing_repo(connected, repository):
    connected.fault("repo_info", Status(403), times=None)
    with pytest.raises(OSError, match="403"):
        repository.info()
