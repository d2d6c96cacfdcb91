# ruff: noqa: F811
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time

import httpx2
import huggingface_hub
import pytest
import yaml
from each import each
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import Delay, LostAnswer, Rival, Status
from huggingface_hub import HfApi
from pipeline import add_card, one_line, sha_tree, small_set

from prism_hf.errors import HubError
from prism_hf.hub.bundle import bundle_of
from prism_hf.hub.merge import BEGIN, END
from prism_hf.hub.push import Publication, publish, reserve
from prism_hf.hub.repository import Target, check_target

REPO, KIND = "org/small", "datasets"


def make_set(folder, *, seed=0, epochs=3, shard_mb=500, name=None):
    recipe, names, *_ = small_set(folder, seed=seed, epochs=epochs, shard_mb=shard_mb, name=name)
    add_card(folder, recipe, names)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("newer"), seed=1, epochs=2)


def push(folder, repo=REPO, *, pauses=(0, 0), **options):
    bundle = bundle_of(folder)
    return publish(bundle, check_target(Target(repo, bundle.kind, **options), bundle.name, pauses=pauses), pauses=pauses)


def local(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def header(readme):
    return yaml.safe_load(readme.decode().split("---\n")[1])


def commits(hub, revision="main"):
    return len(hub.history(KIND, REPO, revision))


# -- the result of a push ---------------------------------------------------------------------------------------------


def test_the_repo_contains_the_folder_and_a_card_with_its_address(connected, folder):
    done = push(folder)
    there = connected.files(KIND, REPO)
    expected = local(folder)
    card = expected.pop("README.md").decode()
    assert {path: there[path] for path in expected} == expected
    assert set(there) - set(expected) == {"README.md", ".gitattributes"}
    assert f'repo = "{REPO}"' in there["README.md"].decode()
    assert "ORG/" not in there["README.md"].decode()
    assert there["README.md"].decode().count("\n") == card.count("\n")
    assert commits(connected) == 2, "the repo's first commit, and ours"
    assert done == Publication(f"{connected.url}/datasets/{REPO}/commit/{connected.history(KIND, REPO)[0]}",
                               connected.history(KIND, REPO)[0], changed=True)  # fmt: skip
    assert connected.repo(KIND, REPO).private, "private by default"
    assert HfApi().repo_info(REPO, repo_type="dataset").card_data["configs"][0]["config_name"] == "default"


def test_pushing_the_same_again_commits_and_uploads_nothing(connected, folder):
    first = push(folder)
    connected.requests.clear()
    second = push(folder)
    assert second == Publication(first.url, first.commit, changed=False)
    assert commits(connected) == 2
    assert not {"commit", "preupload", "lfs_put", "xet_xorb"} & {request.kind for request in connected.requests}


def test_pushing_a_newer_version_removes_the_old_tables(connected, folder, newer):
    push(folder)
    stale = {
        "data/train-00001-of-00002.parquet": b"PAR1",
        "views/train-00007-of-00008.parquet": b"PAR1",
        "assets/grid.png": b"PNG",
    }
    others = {"data/test-00000.parquet": b"PAR1", "LICENSE": b"terms", "notebooks/look.ipynb": b"{}"}
    connected.commit(KIND, REPO, stale | others)
    push(newer)
    there = connected.files(KIND, REPO)
    assert not set(stale) & set(there)
    assert {path: there[path] for path in others} == others
    assert there["provenance.json"] == (newer / "provenance.json").read_bytes()
    assert commits(connected) == 4
    info = {entry["config_name"]: entry for entry in header(there["README.md"])["dataset_info"]}
    assert info["views"]["splits"][0]["num_examples"] == 24


def test_text_by_others_in_the_readme_survives_every_push(connected, folder, newer):
    push(folder)
    text = connected.files(KIND, REPO)["README.md"].decode()
    text = text.replace("license:", "viewer: false\nlicense:", 1).replace(BEGIN, f"Above.\n\n{BEGIN}")
    connected.commit(KIND, REPO, {"README.md": f"{text}\n## Notes of a reader\n".encode()})
    assert not push(folder).changed, "text by others does not cause a commit"
    push(newer)
    merged = connected.files(KIND, REPO)["README.md"].decode()
    assert merged.index("Above.") < merged.index(BEGIN)
    assert merged.index("## Notes of a reader") > merged.index(END)
    assert header(merged.encode())["viewer"] is False
    assert {"configs", "dataset_info"} <= set(header(merged.encode()))


def test_a_branch_is_created_and_main_is_unchanged(connected, folder, newer):
    push(folder)
    done = push(newer, revision="v2")
    assert commits(connected) == 2
    there = connected.files(KIND, REPO, "v2")
    assert there["provenance.json"] == (newer / "provenance.json").read_bytes()
    assert 'load_dataset(repo, revision="v2", split="train")' in there["README.md"].decode()
    assert done.commit == connected.history(KIND, REPO, "v2")[0]
    assert not push(newer, revision="v2").changed


def test_a_pull_request_does_not_change_main_and_is_not_opened_twice(connected, folder, newer):
    push(folder)
    before = connected.files(KIND, REPO)
    assert not push(folder, create_pr=True).changed
    assert not list(HfApi().get_repo_discussions(REPO, repo_type="dataset")), "no change, so no pull request"
    first = push(newer, create_pr=True)
    assert first.url == f"{connected.url}/datasets/{REPO}/discussions/1"
    assert push(newer, create_pr=True).url == first.url
    requests = list(HfApi().get_repo_discussions(REPO, repo_type="dataset"))
    assert [(found.num, found.status) for found in requests] == [(1, "open")]
    assert connected.files(KIND, REPO) == before
    HfApi().merge_pull_request(REPO, 1, repo_type="dataset")
    assert connected.files(KIND, REPO)["provenance.json"] == (newer / "provenance.json").read_bytes()
    assert not push(newer).changed


@pytest.mark.parametrize("kind", ["discussion", "commit", "preupload"])
@pytest.mark.parametrize("action", [LostAnswer(), Status(503)], ids=["lost answer", "503"])
def test_faults_do_not_duplicate_a_pull_request(connected, folder, newer, kind, action):
    push(folder)
    connected.fault(kind, action, match="POST")
    push(newer, create_pr=True)
    assert connected.fired
    requests = list(HfApi().get_repo_discussions(REPO, repo_type="dataset"))
    assert [found.status for found in requests] == ["open"]
    assert connected.files(KIND, REPO, "refs/pr/1")["provenance.json"] == (newer / "provenance.json").read_bytes()


def test_with_public_a_private_repo_becomes_public_after_its_data_is_pushed(connected, folder):
    push(folder)
    seen = []
    connected.fault("settings", Rival(lambda: seen.append(connected.repo(KIND, REPO).private)))
    push(folder, public=True)
    assert seen == [True]
    assert not connected.repo(KIND, REPO).private
    with pytest.raises(HubError) as error:
        push(folder)
    assert "--public" in one_line(error)


def test_a_new_public_repo_is_private_until_its_data_is_pushed(connected, folder):
    ready(public=True)
    assert connected.repo(KIND, REPO).private
    push(folder, public=True)
    assert not connected.repo(KIND, REPO).private


def test_a_name_without_a_namespace_belongs_to_the_user(connected, folder):
    assert "/datasets/ann/mine/commit/" in push(folder, "mine").url


# -- checks before the work -------------------------------------------------------------------------------------------


def ready(repo=REPO, name="digits-prism-ipc10", **options):
    target = check_target(Target(repo, **options), name, pauses=(0, 0))
    reserve(target, pauses=(0, 0))
    return target


def test_a_private_repo_is_reserved_once(connected):
    assert ready() == Target(REPO)
    assert connected.repo(KIND, REPO).private
    assert ready() == Target(REPO)
    assert commits(connected) == 1


@each("repo", ["a/b/c", "org/--", "org/x..y", "", "org/" + "x" * 100, "org/x.git", "ü/x", "org/ x"])
def test_an_invalid_name_is_reported_before_any_request(connected, repo):
    with pytest.raises(HubError) as error:
        ready(repo)
    assert repr(repo) in one_line(error)
    assert not connected.requests


@each("branch", ["a..b", "/x", "x/", "-x", "a b", "refs/pr/1", "x.lock", ""])
def test_an_invalid_branch_is_reported_before_any_request(connected, branch):
    with pytest.raises(HubError) as error:
        ready(revision=branch)
    assert "--revision" in one_line(error)
    assert not connected.requests


def test_a_pull_request_to_a_branch_is_refused(connected):
    with pytest.raises(HubError, match="not both"):
        ready(revision="v2", create_pr=True)


def test_without_a_token_no_request_is_sent(connected, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError) as error:
        ready()
    assert "HF_TOKEN" in one_line(error)
    assert "hf auth login" in one_line(error)
    assert not connected.requests


def test_offline_no_request_is_sent(connected, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        ready()


@pytest.mark.parametrize(
    ("account", "repo", "words"),
    [
        ({"token": None}, REPO, "token"),
        ({"role": "read"}, REPO, "can only read"),
        ({"orgs": ()}, REPO, "neither you nor your organization"),
        ({"orgs": (("org", "read"),)}, REPO, "permission"),
        ({"role": "fineGrained", "fine_grained": {"scoped": []}}, REPO, "permission"),
    ],
    ids=["unknown token", "read token", "foreign organization", "reader in the organization", "fine-grained without write"],
)
def test_missing_write_access_is_reported_at_once(connected, monkeypatch, account, repo, words):
    token = connected.add_user(
        "bob", token="hf_bobs", **{"orgs": ("org",)} | {k: v for k, v in account.items() if k != "token"}
    )
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys" if "token" in account else token)
    with pytest.raises(HubError) as error:
        ready(repo)
    assert words in one_line(error)
    assert "hf_" not in one_line(error)
    assert len([r for r in connected.requests if r.status in (401, 403)]) <= 1, "401 and 403 are not retried"
    assert not connected.exists(KIND, repo)


def test_a_repo_of_another_owner_is_refused(connected, monkeypatch):
    connected.create(KIND, "carl/open", {"data.csv": b"1"})
    connected.create(KIND, "carl/hidden", {"data.csv": b"1"}, private=True)
    with pytest.raises(HubError, match="permission"):
        ready("carl/open", public=True)
    with pytest.raises(HubError, match="neither you nor your organization"):
        ready("carl/hidden")


def test_a_repo_with_other_content_is_not_overwritten_by_accident(connected, folder):
    connected.create(KIND, REPO, {"train.csv": b"1,2"}, private=True)
    with pytest.raises(HubError) as error:
        ready()
    assert "train.csv" in one_line(error)
    with pytest.raises(HubError):
        publish(bundle_of(folder), Target(REPO), pauses=())
    assert commits(connected) == 2
    push(folder, replace_other=True)
    assert connected.files(KIND, REPO)["train.csv"] == b"1,2", "files by others are kept"


def test_another_prism_dataset_is_not_overwritten_by_accident(connected, folder, tmp_path):
    push(folder)
    other = make_set(tmp_path / "other", name="other-ipc1")
    with pytest.raises(HubError) as error:
        push(other)
    assert "'digits-prism-ipc10'" in one_line(error)
    assert "--replace" in one_line(error)
    push(other, replace_other=True)
    assert connected.files(KIND, REPO)["provenance.json"] == (other / "provenance.json").read_bytes()


def test_a_repo_with_only_a_readme_and_a_license_can_be_used(connected, folder):
    connected.create(KIND, REPO, {"README.md": b"---\nlicense: mit\n---\nSoon.\n", "LICENSE": b"x"}, private=True)
    push(folder)
    assert b"Soon." in connected.files(KIND, REPO)["README.md"]


def test_a_pull_request_needs_a_repo_but_no_write_access(connected, folder, newer, monkeypatch):
    with pytest.raises(HubError, match="--create-pr"):
        ready("org/nothing", create_pr=True)
    push(folder, public=True)
    monkeypatch.setenv("HF_TOKEN", connected.add_user("guest", token="hf_guest"))
    with pytest.raises(HubError, match="--public"):
        push(newer, create_pr=True)
    assert push(newer, create_pr=True, public=True).url.endswith("/discussions/1")


# -- faults that the matrix does not cover ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whoami", "repo_info", "auth_check", "tree", "create_repo"])
@pytest.mark.parametrize(
    "action", [Status(503), Status(502, b"<html>", html=True), LostAnswer()], ids=["503", "html", "lost"]
)
def test_the_check_retries_temporary_errors(connected, folder, kind, action):
    if kind in ("auth_check", "tree"):
        push(folder)
    connected.fault(kind, action)
    assert ready() == Target(REPO)
    assert connected.fired == 1


def test_a_token_that_expires_during_a_push_is_not_retried(connected, folder):
    target = ready()
    connected.fault("preupload", Status(401), times=None)
    with pytest.raises(HubError) as error:
        publish(bundle_of(folder), target, pauses=(0, 0, 0))
    assert "hf auth login" in one_line(error)
    assert len([r for r in connected.requests if r.kind == "preupload"]) == 1
    assert commits(connected) == 1


def test_retry_after_is_respected(connected, folder, caplog):
    target = ready()
    connected.fault("commit", Status(429, headers={"Retry-After": "1"}))
    caplog.set_level(logging.INFO, "prism_hf")
    publish(bundle_of(folder), target, pauses=(0,))
    assert "trying again in 1 s" in caplog.text


def test_a_folder_that_changed_since_it_was_packaged_is_not_pushed(connected, tmp_path):
    folder = make_set(tmp_path / "set")
    table = folder / "data" / "train-00000-of-00001.parquet"
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(HubError) as error:
        push(folder)
    assert "data/train-00000-of-00001.parquet" in one_line(error)
    assert not connected.requests


def test_files_that_the_repo_ignores_are_not_silently_omitted(connected, folder, newer):
    push(folder)
    connected.commit(KIND, REPO, {".gitignore": b"views/*.parquet\n"})
    before = connected.files(KIND, REPO)
    with pytest.raises(HubError) as error:
        push(newer)
    assert "views/train-00000-of-00001.parquet" in one_line(error)
    assert ".gitignore" in one_line(error)
    assert connected.files(KIND, REPO) == before


def test_a_folder_repackaged_during_the_push_is_detected(connected, folder, newer, tmp_path):
    place = tmp_path / "set"
    shutil.copytree(folder, place)
    ready()

    def package():
        shutil.rmtree(place)
        shutil.copytree(newer, place)

    connected.fault("preupload", Rival(package))
    with pytest.raises(HubError) as error:
        push(place)
    assert "changed while it was being uploaded" in one_line(error)
    assert commits(connected) == 1


def test_a_control_does_not_replace_its_dataset(connected, folder, tmp_path):
    push(folder)
    control = tmp_path / "control"
    recipe, names, *_ = small_set(control, seed=5)
    add_card(control, recipe, names, images="random_real")
    with pytest.raises(HubError, match="random real images"):
        push(control)
    push(control, "org/control")


def test_a_repo_made_public_during_the_upload_gets_no_commit(connected, folder, newer):
    push(folder)
    connected.fault("preupload", Rival(lambda: HfApi().update_repo_settings(REPO, repo_type="dataset", private=False)))
    with pytest.raises(HubError, match="--public"):
        push(newer)
    assert commits(connected) == 2


def test_a_name_taken_by_an_invisible_repo_gives_a_one_line_error(connected, folder):
    connected.fault("repo_info", Status(404, headers={"X-Error-Code": "RepoNotFound"}), times=None)
    taken = json.dumps({"url": f"{connected.url}/datasets/{REPO}"}).encode()
    connected.fault("create_repo", Status(409, taken), times=None)
    with pytest.raises(HubError) as error:
        publish(bundle_of(folder), Target(REPO), pauses=())
    assert "not for this token" in one_line(error)


def test_a_commit_is_not_accepted_as_a_branch(connected, folder):
    commit = push(folder).commit
    with pytest.raises(HubError, match="--revision"):
        ready(revision=commit)


@pytest.mark.parametrize("answer", [{}, {"name": None}, {"name": "ann", "orgs": None, "auth": None},
                                    {"name": "ann", "orgs": [{"name": "org"}], "auth": {"accessToken": None}}])  # fmt: skip
def test_an_unusual_whoami_gives_a_one_line_error_or_is_accepted(connected, answer):
    connected.fault("whoami", Status(200, json.dumps(answer).encode()))
    if answer.get("orgs"):
        ready()
        return
    with pytest.raises(HubError) as error:
        ready()
    one_line(error)


def test_a_silent_hub_causes_a_timeout_and_a_retry(connected, folder, monkeypatch):
    monkeypatch.setattr("prism_hf.runtime.hub_client._TIMEOUT", httpx2.Timeout(0.3))
    connected.fault("repo_info", Delay(1.0))
    assert push(folder).changed
    assert commits(connected) == 2


def killed(folder, url, transport, env):
    os.environ.update(env)
    publish(bundle_of(folder), Target(REPO), pauses=(0, 0))


def test_the_push_after_a_killed_one_uploads_only_missing_files(connected, transport, tmp_path):
    """The second of two big files hangs and the process is killed. The next push does not upload the first one again."""
    folder = make_set(tmp_path / "set", epochs=40)
    ready()
    sent = {"lfs": "lfs_put", "xet": "xet_xorb"}[transport]
    hung = multiprocessing.get_context("fork").Event()
    connected.fault(sent, Rival(lambda: (hung.set(), time.sleep(1))), skip=1)
    child = multiprocessing.get_context("fork").Process(target=killed, args=(folder, connected.url, transport, {}))
    child.start()
    assert hung.wait(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert commits(connected) == 1
    connected.requests.clear()
    push(folder)
    assert len([r for r in connected.requests if r.kind == sent]) == 1
    assert connected.files(KIND, REPO)["provenance.json"] == (folder / "provenance.json").read_bytes()


def test_the_token_appears_nowhere(connected, folder, newer, caplog):
    caplog.set_level(logging.DEBUG)
    push(folder)
    connected.fault("commit", Status(503))
    push(newer)
    token = os.environ["HF_TOKEN"]
    assert token not in caplog.text
    assert not [path for path, data in connected.files(KIND, REPO).items() if token.encode() in data]
    assert not connected.leaks
    assert sha_tree(newer)
    assert not [r for r in connected.requests if token in r.path]
    assert re.fullmatch(r"hf_\w+", token)
