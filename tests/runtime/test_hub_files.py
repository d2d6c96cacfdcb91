# ruff: noqa: F811
import json

import huggingface_hub
import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import Status

from prism_hf.errors import HubError
from prism_hf.runtime.hub_files import fetch_snapshot, repo_info

SET = "org/set"
pytestmark = pytest.mark.parametrize("transport", ["lfs"], indirect=True)


@pytest.fixture
def server(connected, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    connected.create("datasets", SET, {"README.md": b"# set\n", "data/train-0.parquet": b"PAR1", "notes.txt": b"x"})
    return connected


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_snapshot_holds_the_files_asked_for_of_the_newest_commit(server):
    first = fetch_snapshot(SET, "dataset", None, ["data/*.parquet"])
    assert names(first) == ["data/train-0.parquet"]
    head = server.commit("datasets", SET, {"data/train-0.parquet": b"PAR2"})
    second = fetch_snapshot(SET, "dataset", "main", ["data/*.parquet", "README.md"])
    assert names(second) == ["README.md", "data/train-0.parquet"]
    assert (second.name, (second / "data/train-0.parquet").read_bytes()) == (head, b"PAR2")
    assert first.name != head


def test_offline_the_cache_answers_for_a_branch_and_for_a_commit(server, monkeypatch):
    folder = fetch_snapshot(SET, "dataset", None, ["data/*"])
    offline(monkeypatch)
    server.requests.clear()
    assert fetch_snapshot(SET, "dataset", None, ["data/*"]) == folder
    assert fetch_snapshot(SET, "dataset", folder.name, ["data/*"]) == folder
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1"):
        fetch_snapshot(SET, "dataset", "v2", ["data/*"])
    assert server.requests == []


def test_a_broken_download_leaves_the_older_snapshot_in_use(server, monkeypatch):
    old = fetch_snapshot(SET, "dataset", None, ["data/*"])
    server.commit("datasets", SET, {"data/train-0.parquet": b"PAR2"})
    server.fault("cdn_get", Status(404), times=None)
    with pytest.raises(HubError, match="downloading dataset 'org/set' failed"):
        fetch_snapshot(SET, "dataset", None, ["data/*"])
    offline(monkeypatch)
    assert fetch_snapshot(SET, "dataset", None, ["data/*"]) == old


@pytest.mark.parametrize(
    ("repo", "revision", "words"),
    [("org/none", None, "dataset org/none is not on the Hub"), (SET, "v9", "no such revision")],
)
def test_what_is_not_there_is_one_line(server, repo, revision, words):
    with pytest.raises(HubError, match=words) as error:
        fetch_snapshot(repo, "dataset", revision, ["*"])
    assert not error.value.away
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [b"[]", b'{"status": "ok"}', json.dumps({"id": SET, "sha": "../../x"}).encode()])
def test_an_answer_without_a_commit_is_not_that_of_a_hub(server, answer):
    server.fault("repo_info", Status(200, answer), times=None)
    with pytest.raises(HubError, match="names no commit of org/set") as error:
        repo_info(SET, "dataset", None)
    assert error.value.away
