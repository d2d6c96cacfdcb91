# ruff: noqa: F811
import dataclasses
import json
import logging
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from each import each
from foreign_teachers import bomb_in
from hub_fixtures import fast_retries, hub, online, transport  # noqa: F401
from hub_server import CutBody, Reset, Status
from huggingface_hub import HfApi
from pipeline import one_line, save_timm
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from prism_hf.errors import TeacherError
from prism_hf.models import download
from prism_hf.models.load import load_teacher
from prism_hf.models.teacher import fit_teacher
from prism_hf.runtime.hub_client import BRIEF

CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cat")
REPO = "org/net"
SECRET = "hf_a_secret_that_no_message_shows"


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    return save_timm(tmp_path_factory.mktemp("weights") / "timm", names=NAMES, license="mit", mean=[0.1, 0.2, 0.3])


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    return save_transformers(tmp_path_factory.mktemp("weights") / "transformers")


def save_transformers(folder, **save):
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetForImageClassification(config).save_pretrained(folder, **save)
    size = {"height": 24, "width": 24}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture
def server(hub, online, monkeypatch, tmp_path):
    """The test Hub, used by all clients in this process, with an empty cache."""
    speak_to(monkeypatch, hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def speak_to(monkeypatch, url):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def go_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def close_the_hub(monkeypatch):
    """Use a port on which nothing listens as the Hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    speak_to(monkeypatch, url)


@pytest.fixture
def naps(monkeypatch):
    """Record every sleep of this process and skip it."""
    taken = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


def contents(folder, **more):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} | more


def create(server, folder, repo=REPO, *, without=(), private=False, gated=False, granted=(), **more):
    files = {name: data for name, data in contents(folder).items() if name not in without}
    files |= {name.replace("__", "."): data for name, data in more.items()}
    server.create("models", repo, files, private=private, gated=gated, granted=granted)
    return server.history("models", repo)[0]


def publish(server, folder, repo=REPO):
    """Upload with the real client, so that the transport decides where large files are stored."""
    api = HfApi(endpoint=server.url, token=server.add_user(repo.partition("/")[0], token=SECRET))
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    server.requests.clear()
    return server.history("models", repo)[0]


def sha256(source):
    return load_teacher(source, device=CPU).weights_sha256


def snapshot(commit, repo=REPO):
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def refused(name, *words):
    with pytest.raises(TeacherError) as error:
        load_teacher(name, device=CPU)
    text = one_line(error)
    assert all(word in text for word in [name, *words]), text
    assert SECRET not in text
    return text


def kinds(server):
    return [request.kind for request in server.requests]


@pytest.fixture
def bomb(tmp_path):
    return bomb_in(tmp_path)


# -- loaded teachers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["hf-hub:{repo}", "hf_hub:{repo}", "hf-hub:{repo}@main", "hf-hub:{repo}@{commit}"])
def test_a_timm_teacher_from_the_hub_equals_the_stored_one(server, transport, timm_folder, at):
    commit = publish(server, timm_folder)
    name = at.format(repo=REPO, commit=commit)
    teacher = load_teacher(name, device=CPU)
    assert teacher.weights_sha256 == sha256(f"local-dir:{timm_folder}")
    assert (teacher.name, teacher.revision, teacher.license) == (name, commit, "mit")
    assert (teacher.mean, teacher.label_names, teacher.architecture) == ((0.1, 0.2, 0.3), NAMES, "test_byobnet")
    fit_teacher(teacher, class_names=NAMES, channels=3)
    stored = load_file(snapshot(commit) / "model.safetensors")
    model = teacher.model.state_dict()
    assert all(torch.equal(stored[key], model[key]) for key in model)
    assert ("xet_reconstruction" in kinds(server)) == (transport == "xet")


def test_a_transformers_teacher_from_the_hub_equals_the_stored_one(server, transport, transformers_folder):
    commit = publish(server, transformers_folder)
    teacher = load_teacher(f"transformers:{REPO}", device=CPU)
    assert teacher.weights_sha256 == sha256(f"transformers:{transformers_folder}")
    assert (teacher.revision, teacher.license, teacher.label_names) == (commit, "unknown", NAMES)
    assert (teacher.mean, teacher.std, teacher.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 24)


def test_sharded_weights_are_combined(server, tmp_path, transformers_folder):
    folder = save_transformers(tmp_path / "shards", max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    create(server, folder)
    assert (
        sha256(f"transformers:{REPO}") == sha256(f"transformers:{transformers_folder}") == sha256(f"transformers:{folder}")
    )
    refused(f"hf-hub:{REPO}", "model.safetensors")  # timm reads only one file


def test_a_plain_timm_name_uses_the_facts_from_timm(server, tmp_path):
    name, repo = "test_byobnet.r160_in1k", "timm/test_byobnet.r160_in1k"
    folder = save_timm(tmp_path / "net", classes=1000, mean=[0.9, 0.9, 0.9], license="another")
    commit = create(server, folder, repo, README__md=b"---\nlicense: a third\n---\n")
    known = timm.get_pretrained_cfg(name)
    for spelled in (name, "test_byobnet"):
        teacher = load_teacher(spelled, device=CPU)
        assert teacher.weights_sha256 == sha256(f"local-dir:{folder}")
        assert (teacher.num_classes, teacher.architecture, teacher.revision) == (1000, "test_byobnet", commit)
        assert (teacher.mean, teacher.size, teacher.license) == (known.mean, known.input_size[-1], known.license)
    # The config of the repository is not even downloaded.
    assert sorted(path.name for path in snapshot(commit, repo).iterdir()) == ["README.md", "model.safetensors"]


def test_a_plain_timm_name_may_specify_the_file(server, monkeypatch, timm_folder):
    repo = "timm/test_byobnet.r160_in1k"
    create(server, timm_folder, repo, without=["model.safetensors"], own__safetensors=b"x", own__npz=b"x")
    known = timm.get_pretrained_cfg("test_byobnet")
    for file, words in {"own.npz": ["own.npz", "only safetensors"], "own.safetensors": ["SafetensorError"]}.items():
        cfg = dataclasses.replace(known, hf_hub_filename=file)
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _, cfg=cfg: cfg)
        refused("test_byobnet", *words)


def test_a_plain_timm_name_with_another_head_gives_a_one_line_error(server, timm_folder):
    create(server, timm_folder, "timm/test_byobnet.r160_in1k")
    assert "size mismatch" in refused("test_byobnet.r160_in1k", "cannot be loaded")


def test_a_branch_loads_its_own_commit(server, tmp_path, timm_folder):
    first = create(server, timm_folder)
    other = save_timm(tmp_path / "other", seed=1, names=NAMES)
    server.repo("models", REPO).refs["refs/pr/1"] = first
    second = server.commit("models", REPO, contents(other), branch="refs/pr/1")
    pinned = load_teacher(f"hf-hub:{REPO}@refs/pr/1", device=CPU)
    assert (pinned.revision, pinned.weights_sha256) == (second, sha256(f"local-dir:{other}"))
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).revision == first
    assert load_teacher(f"hf-hub:{REPO}@{second}", device=CPU).revision == second


@pytest.mark.parametrize("kind", ["hf-hub", "transformers"])
def test_only_files_that_are_read_are_downloaded(server, timm_folder, transformers_folder, kind):
    folder = timm_folder if kind == "hf-hub" else transformers_folder
    extra = {"README__md": b"# net\n", "pytorch_model__bin": b"x", "notes__txt": b"x", "model__onnx": b"x"}
    commit = create(server, folder, **extra)
    load_teacher(f"{kind}:{REPO}", device=CPU)
    beside = ["preprocessor_config.json"] if kind == "transformers" else []
    expected = sorted(["README.md", "config.json", "model.safetensors", *beside])
    assert sorted(path.name for path in snapshot(commit).iterdir()) == expected


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ("mit", b"---\nlicense: apache-2.0\n---\n", "mit"),
        (None, b"---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        (None, b"---\nlicense: other\nlicense_name: apple-ascl\n---\n", "apple-ascl"),
        (None, b"---\nlicense: [mit, cc0-1.0]\n---\n", "mit, cc0-1.0"),
        (None, b"---\ntags: [x]\n---\n", "unknown"),
        (None, b"---\nlicense: [\n---\n", "unknown"),
        (None, b"no metadata", "unknown"),
        (None, None, "unknown"),
    ],
)
def test_the_license_comes_from_the_config_or_else_from_the_card(server, monkeypatch, tmp_path, config, card, expected):
    folder = save_timm(tmp_path / "net", license=config)
    create(server, folder, **({"README__md": card} if card else {}))
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).license == expected
    go_offline(monkeypatch)
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).license == expected


# -- requests to the Hub ----------------------------------------------------------------------------------------------


def test_a_warm_cache_needs_one_request_and_a_cached_commit_none(server, timm_folder):
    commit = create(server, timm_folder)
    first = sha256(f"hf-hub:{REPO}")
    server.requests.clear()
    assert sha256(f"hf-hub:{REPO}") == first
    assert kinds(server) == ["repo_info"]
    assert sha256(f"hf-hub:{REPO}@{commit}") == first
    assert kinds(server) == ["repo_info"]
    assert [path.name for path in (snapshot(commit).parents[1] / "refs").iterdir()] == ["main"]


def test_a_new_commit_is_loaded_and_a_broken_download_keeps_the_old_one(server, monkeypatch, tmp_path, timm_folder):
    first = create(server, timm_folder)
    old = load_teacher(f"hf-hub:{REPO}", device=CPU)
    other = save_timm(tmp_path / "other", seed=1, names=NAMES)
    second = server.commit("models", REPO, contents(other))
    server.fault("cdn_get", Status(404), times=None)
    refused(f"hf-hub:{REPO}")
    go_offline(monkeypatch)
    again = load_teacher(f"hf-hub:{REPO}", device=CPU)
    assert (again.revision, again.weights_sha256) == (first, old.weights_sha256)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.clear_faults()
    new = load_teacher(f"hf-hub:{REPO}", device=CPU)
    assert (new.revision, new.weights_sha256) == (second, sha256(f"local-dir:{other}"))


@pytest.mark.parametrize(
    "trouble", [Status(503), Status(429), Status(500, html=True, body=b"<html>"), Reset(), CutBody(20)]
)
def test_a_temporary_error_is_retried(server, naps, timm_folder, trouble):
    create(server, timm_folder)
    server.fault("repo_info", trouble, times=2)
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).license == "mit"
    assert [nap for nap in naps if nap in BRIEF] == list(BRIEF[:2])


def test_the_pauses_are_short():
    assert sum(BRIEF) < 5


@pytest.mark.parametrize("status", [503, 429])
def test_a_permanent_error_gives_a_one_line_error(server, naps, timm_folder, status):
    create(server, timm_folder)
    server.fault("repo_info", Status(status), times=None)
    text = refused(f"hf-hub:{REPO}", f"answers {status}", "no files of org/net", "`hf download org/net`")
    assert "again later" not in text, "one piece of advice is enough"
    assert naps == list(BRIEF)
    assert len(server.requests) == len(naps) + 1


def test_a_permanent_error_with_a_warm_cache_is_a_warning(server, naps, timm_folder, caplog):
    commit = create(server, timm_folder)
    load_teacher(f"hf-hub:{REPO}", device=CPU)
    server.fault("repo_info", Status(503), times=None)
    with caplog.at_level(logging.INFO, "prism_hf.models.download"):
        assert load_teacher(f"hf-hub:{REPO}", device=CPU).revision == commit
    (record,) = [record for record in caplog.records if record.name == "prism_hf.models.download"]
    assert record.levelno == logging.WARNING
    assert all(word in record.getMessage() for word in ("answers 503", commit, REPO, "from the cache"))


def test_a_web_page_in_place_of_the_hub_gives_a_one_line_error(server, naps, timm_folder):
    create(server, timm_folder)
    server.fault("repo_info", Status(200, b"<html>Please log in to this hotel</html>", html=True), times=None)
    refused(f"hf-hub:{REPO}", "does not answer like a Hub", "HF_ENDPOINT")
    server.clear_faults()
    server.fault("repo_info", Status(200, json.dumps({"id": REPO, "sha": "../../escape"}).encode()), times=None)
    refused(f"hf-hub:{REPO}", "returned no commit", "HF_ENDPOINT")
    assert naps == list(BRIEF), "a login may remove the page, so it is temporary; a wrong answer is not"


# -- without the Hub --------------------------------------------------------------------------------------------------

TROUBLES = {
    "offline": ("HF_HUB_OFFLINE=1", logging.INFO, go_offline),
    "closed": ("not reachable", logging.WARNING, close_the_hub),
}
without_the_hub = pytest.mark.parametrize("trouble", TROUBLES)
every_kind = pytest.mark.parametrize("kind", ["hf-hub", "transformers", "plain"])


def named(kind, tmp_path, timm_folder, transformers_folder):
    """Return the teacher, repository and folder of one kind of source."""
    if kind == "plain":
        return "test_byobnet.r160_in1k", "timm/test_byobnet.r160_in1k", save_timm(tmp_path / "plain", classes=1000)
    return f"{kind}:{REPO}", REPO, timm_folder if kind == "hf-hub" else transformers_folder


@without_the_hub
@every_kind
def test_a_complete_cache_works_without_the_hub(
    server, monkeypatch, tmp_path, naps, caplog, timm_folder, transformers_folder, kind, trouble
):
    name, repo, folder = named(kind, tmp_path, timm_folder, transformers_folder)
    commit = create(server, folder, repo)
    online_one = load_teacher(name, device=CPU)
    words, level, break_it = TROUBLES[trouble]
    break_it(monkeypatch)
    server.requests.clear()
    with caplog.at_level(logging.INFO, "prism_hf.models.download"):
        teacher = load_teacher(name, device=CPU)
    assert (teacher.revision, teacher.weights_sha256) == (commit, online_one.weights_sha256)
    assert teacher.license == online_one.license
    assert server.requests == naps == []
    (record,) = [record for record in caplog.records if record.name == "prism_hf.models.download"]
    assert record.levelno == level
    assert all(word in record.getMessage() for word in (words, commit, repo, name))


@without_the_hub
@every_kind
def test_an_empty_cache_without_the_hub_gives_a_one_line_error(
    server, monkeypatch, tmp_path, naps, timm_folder, transformers_folder, kind, trouble
):
    name, repo, folder = named(kind, tmp_path, timm_folder, transformers_folder)
    create(server, folder, repo)
    words, _, break_it = TROUBLES[trouble]
    break_it(monkeypatch)
    refused(name, words, repo, f"`hf download {repo}`", "local-dir:PATH")
    assert server.requests == naps == []


@without_the_hub
@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_the_error_for_an_incomplete_cache_names_the_missing_file(server, monkeypatch, naps, timm_folder, trouble, lost):
    commit = create(server, timm_folder)
    load_teacher(f"hf-hub:{REPO}", device=CPU)
    (snapshot(commit) / lost).unlink()
    TROUBLES[trouble][2](monkeypatch)
    refused(f"hf-hub:{REPO}", f"without {lost}")
    refused(f"hf-hub:{REPO}@{commit}", f"without {lost}", f"--revision {commit}")
    assert naps == []


def test_an_incomplete_cache_is_completed_online(server, timm_folder):
    commit = create(server, timm_folder)
    expected = sha256(f"hf-hub:{REPO}")
    (snapshot(commit) / "model.safetensors").unlink()
    assert sha256(f"hf-hub:{REPO}@{commit}") == expected
    assert [path.name for path in (snapshot(commit).parents[1] / "refs").iterdir()] == ["main"]


def test_the_error_for_a_missing_shard_names_it(server, monkeypatch, tmp_path):
    folder = save_transformers(tmp_path / "shards", max_shard_size="10KB")
    commit = create(server, folder)
    load_teacher(f"transformers:{REPO}", device=CPU)
    lost = sorted(snapshot(commit).glob("model-*.safetensors"))[1]
    lost.unlink()
    go_offline(monkeypatch)
    refused(f"transformers:{REPO}", f"without {lost.name}")


def test_a_cached_revision_is_not_used_for_another_one(server, monkeypatch, timm_folder):
    create(server, timm_folder)
    load_teacher(f"hf-hub:{REPO}", device=CPU)
    go_offline(monkeypatch)
    refused(f"hf-hub:{REPO}@v2", "'v2'", "no files of")
    refused(f"hf-hub:{REPO}@{'a' * 40}", "no files of")


def test_a_cache_filled_by_other_libraries_is_used(server, monkeypatch, timm_folder):
    commit = create(server, timm_folder)
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download(REPO, name)
    server.requests.clear()
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).revision == commit
    assert kinds(server) == ["repo_info"]
    go_offline(monkeypatch)
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).revision == commit


def test_a_cache_without_links_is_used(server, timm_folder):
    commit = create(server, timm_folder)
    expected = sha256(f"hf-hub:{REPO}")
    for path in snapshot(commit).iterdir():  # as on Windows
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert sha256(f"hf-hub:{REPO}") == expected


def test_other_libraries_use_our_cache(server, monkeypatch, timm_folder):
    create(server, timm_folder)
    load_teacher(f"hf-hub:{REPO}", device=CPU)
    go_offline(monkeypatch)
    assert timm.create_model(f"hf-hub:{REPO}", pretrained=True).num_classes == 3


# -- refusals by the Hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "repo", "words"),
    [
        (None, "org/nothing", ["model org/nothing is not on the Hub", "or it is private", "hf auth login", "HF_TOKEN"]),
        ("ann", "org/nothing", ["model org/nothing is not on the Hub"]),
        (None, "org/private", ["or it is private", "hf auth login"]),
        ("ann", "org/private", ["or it is private"]),
        (None, "org/gated", ["gated", "request access at", "/org/gated"]),
        ("ann", "org/gated", ["gated", "request access at", "/org/gated"]),
        ("nobody", "org/open", ["does not accept the token (401", "hf auth login", "unset it"]),
        (None, "org/open@v9", ["at 'v9'", "org/open has no such revision", "branches, tags or commits"]),
        (None, f"org/open@{'0' * 40}", ["has no such revision"]),
    ],
)
@pytest.mark.parametrize("kind", ["hf-hub", "transformers"])
def test_a_refusal_gives_a_one_line_error_at_once(server, monkeypatch, naps, timm_folder, kind, who, repo, words):
    create(server, timm_folder, "org/private", private=True)
    create(server, timm_folder, "org/gated", gated="auto", granted=["bob"])
    create(server, timm_folder, "org/open")
    if who:
        monkeypatch.setenv("HF_TOKEN", SECRET)
    if who == "ann":
        server.add_user("ann", token=SECRET)
    refused(f"{kind}:{repo}", *words)
    assert naps == []
    assert len(server.requests) <= 4


@pytest.mark.parametrize(("who", "repo"), [("org", "org/private"), ("bob", "org/gated"), ("org", "org/gated")])
def test_a_user_with_access_gets_the_weights(server, transport, monkeypatch, timm_folder, who, repo):
    publish(server, timm_folder, repo)
    server.repo("models", repo).private = repo == "org/private"
    server.repo("models", repo).gated = "manual" if repo == "org/gated" else False
    server.repo("models", repo).granted.add("bob")
    refused(f"hf-hub:{repo}")
    monkeypatch.setenv("HF_TOKEN", server.add_user(who, token=SECRET))
    assert sha256(f"hf-hub:{repo}") == sha256(f"local-dir:{timm_folder}")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Status(403), ["not have permission to do this", "403", "read or write access"]),
        (Status(403, headers={"X-Error-Message": "Access to this resource is disabled."}), ["403"]),
        (Status(451), ["answers 451"]),
    ],
)
def test_the_error_for_another_refusal_names_the_status(server, naps, timm_folder, fault, words):
    create(server, timm_folder)
    server.fault("repo_info", fault, times=None)
    refused(f"hf-hub:{REPO}", *words)
    assert naps == []


def test_a_password_in_the_address_of_the_hub_is_not_shown(server, monkeypatch, naps):
    speak_to(monkeypatch, server.url.replace("//", f"//me:{SECRET}@"))
    server.fault("repo_info", Status(403, headers={"X-Error-Code": "GatedRepo"}))
    refused(f"hf-hub:{REPO}", f"{server.url}/{REPO}")
    server.fault("repo_info", Status(503), times=None)
    refused(f"hf-hub:{REPO}", f"{server.url} answers 503")


@pytest.mark.parametrize("character", ["\u20ac", "\x0bx"])
def test_a_token_that_is_not_a_valid_header_is_not_shown(server, monkeypatch, naps, timm_folder, character):
    create(server, timm_folder)
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}{character}")
    refused(f"hf-hub:{REPO}", "token contains invalid characters")
    assert naps == server.requests == []


@each("source", ["", "org/net@", "a/b/c", "org/net@../../x", "org/net@/x", "org/net@a b", "org/net@a@b", "../x"])
@each("kind", ["hf-hub", "hf_hub", "transformers"])
def test_an_invalid_hub_id_gives_a_one_line_error(server, kind, source):
    refused(f"{kind}:{source}" if (kind, source) != ("transformers", "../x") else "transformers:../no-such-folder")
    assert server.requests == []


# -- missing files, and files that must not be opened -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf-hub", "transformers", "plain"])
def test_a_repository_of_pickles_is_refused_and_not_downloaded(
    server, tmp_path, naps, bomb, timm_folder, transformers_folder, kind
):
    data, fired = bomb
    name, repo, folder = named(kind, tmp_path, timm_folder, transformers_folder)
    create(server, folder, repo, without=["model.safetensors"], pytorch_model__bin=data)
    refused(
        name, "only pytorch_model.bin", "model.safetensors", "save_for_hf", "safe_serialization=True", "save_pretrained"
    )
    assert kinds(server) == ["repo_info"]
    assert naps == []
    assert not fired.exists()


@pytest.mark.parametrize("kind", ["hf-hub", "transformers", "plain"])
@pytest.mark.parametrize("cached", [False, True])
def test_pickles_beside_safetensors_are_never_opened(
    server, tmp_path, bomb, timm_folder, transformers_folder, kind, cached
):
    data, fired = bomb
    name, repo, folder = named(kind, tmp_path, timm_folder, transformers_folder)
    hostile = ("pytorch_model__bin", "model__pth", "a__bin", "training_args__bin", "model__ckpt")
    create(server, folder, repo, **dict.fromkeys(hostile, data))
    if cached:
        huggingface_hub.snapshot_download(repo)
    source = f"transformers:{folder}" if kind == "transformers" else f"local-dir:{folder}"
    assert sha256(name) == sha256(source)
    assert not fired.exists()


@pytest.mark.parametrize(
    "weight_map", [{"w": "pytorch_model.bin"}, {"w": "../../model.bin"}, {"w": "/etc/hostname"}, {"w": 7}, {}, [1], None]
)
def test_an_index_that_points_to_anything_but_safetensors_is_refused(server, bomb, transformers_folder, weight_map):
    data, fired = bomb
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    more = {"pytorch_model__bin": data, "model__safetensors__index__json": index}
    commit = create(server, transformers_folder, without=["model.safetensors"], **more)
    refused(f"transformers:{REPO}", "model.safetensors.index.json")
    huggingface_hub.snapshot_download(REPO)
    refused(f"transformers:{REPO}", "model.safetensors.index.json")
    refused(f"transformers:{snapshot(commit)}", "model.safetensors.index.json")
    assert not fired.exists()


@pytest.mark.parametrize(
    ("kind", "without", "more", "words"),
    [
        ("hf-hub", ["config.json"], {}, ["has no config.json"]),
        ("transformers", ["config.json"], {}, ["has no config.json"]),
        ("hf-hub", ["model.safetensors"], {}, ["has no model.safetensors", "save_for_hf"]),
        ("hf-hub", [], {"config__json": b"{}"}, ["config.json has no 'architecture'", "transformers:"]),
        ("hf-hub", [], {"config__json": b"["}, ["config.json cannot be read (Invalid JSON", "transformers:"]),
        ("hf-hub", [], {"config__json": b'{"architecture": "resnet1800"}'}, ["no architecture 'resnet1800'"]),
        (
            "hf-hub",
            [],
            {"config__json": b'{"architecture": ["x"]}'},
            ["config.json has ['x'] as 'architecture'", "valid string"],
        ),
        ("hf-hub", [], {"config__json": b'{"architecture": "test_byobnet", "model_args": {"x": 1}}'}, ["TypeError"]),
        ("hf-hub", [], {"config__json": b'{"architecture": "test_byobnet", "model_args": 3}'}, ["cannot be loaded"]),
        ("transformers", [], {"config__json": b'{"model_type": "nonsense"}'}, ["cannot be loaded"]),
        ("transformers", [], {"adapter_config__json": b"{}"}, ["adapts another model"]),
        ("transformers", ["preprocessor_config.json"], {}, ["no preprocessor_config.json", "save the image processor too"]),
    ],
)
def test_a_repository_without_required_files_gives_a_one_line_error(
    server, naps, timm_folder, transformers_folder, kind, without, more, words
):
    create(server, timm_folder if kind == "hf-hub" else transformers_folder, without=without, **more)
    refused(f"{kind}:{REPO}", *words)
    assert naps == []


def test_the_error_says_when_a_transformers_model_is_named_as_a_timm_model(server, transformers_folder):
    create(server, transformers_folder)
    refused(f"hf-hub:{REPO}", "transformers:ORG/NAME")


def test_code_in_a_repository_is_not_executed(server, tmp_path, transformers_folder):
    fired = tmp_path / "fired"
    config = json.loads((transformers_folder / "config.json").read_text())
    config |= {
        "model_type": "hostile",
        "auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageClassification")},
    }
    create(
        server,
        transformers_folder,
        config__json=json.dumps(config).encode(),
        evil__py=f"open({str(fired)!r}, 'w')".encode(),
    )
    refused(f"transformers:{REPO}", "cannot be loaded")
    refused(f"transformers:{huggingface_hub.snapshot_download(REPO)}", "cannot be loaded")
    assert not fired.exists()


def test_a_stored_head_of_another_size_is_not_replaced_by_a_random_one(server, tmp_path, timm_folder):
    folder = Path(shutil.copytree(timm_folder, tmp_path / "net"))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"num_classes": 5}
    (folder / "config.json").write_text(json.dumps(config))
    create(server, folder)
    refused(f"hf-hub:{REPO}", "builds 5 classes, but its weights have 3")
    refused(f"local-dir:{folder}", "builds 5 classes, but its weights have 3")


def test_a_missing_head_is_not_initialized_at_random(server, tmp_path, transformers_folder):
    folder = Path(shutil.copytree(transformers_folder, tmp_path / "net"))
    kept = {key: value for key, value in load_file(folder / "model.safetensors").items() if "classifier" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    create(server, folder)
    refused(f"transformers:{REPO}", "lack 2 tensors", "classifier")


def test_the_check_reports_another_number_of_classes(server, timm_folder):
    create(server, timm_folder)
    with pytest.raises(TeacherError, match="class 'a' is not one of the 3 classes"):
        fit_teacher(load_teacher(f"hf-hub:{REPO}", device=CPU), class_names=[*"abcdefghij"], channels=3)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf-hub", "transformers"])
def test_a_flipped_bit_gives_a_one_line_error(server, transport, timm_folder, transformers_folder, kind):
    publish(server, timm_folder if kind == "hf-hub" else transformers_folder)
    server.corrupt("models", REPO, "model.safetensors")
    for _ in range(2):  # the downloaded file is not trusted on a second try either
        refused(f"{kind}:{REPO}", "model.safetensors does not match the Hub", "delete", "cache/models--org--net and")


def test_a_flipped_bit_in_the_cache_gives_a_one_line_error(server, monkeypatch, timm_folder):
    commit = create(server, timm_folder)
    load_teacher(f"hf-hub:{REPO}", device=CPU)
    blob = (snapshot(commit) / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{commit}"):
        refused(name, "does not match the Hub")
    shutil.rmtree(snapshot(commit).parents[1])
    load_teacher(f"hf-hub:{REPO}", device=CPU)


@pytest.mark.parametrize("kind", ["hf-hub", "transformers"])
@pytest.mark.parametrize("damage", ["truncated", "no weights"])
def test_invalid_weights_give_a_one_line_error(server, timm_folder, transformers_folder, kind, damage):
    folder = timm_folder if kind == "hf-hub" else transformers_folder
    data = (folder / "model.safetensors").read_bytes()[:-100] if damage == "truncated" else b"no weights"
    create(server, folder, model__safetensors=data)
    refused(f"{kind}:{REPO}", "cannot be loaded")


@pytest.mark.parametrize("kind", ["hf-hub", "transformers"])
def test_an_interrupted_download_gives_a_one_line_error(server, naps, timm_folder, transformers_folder, kind):
    create(server, timm_folder if kind == "hf-hub" else transformers_folder)
    server.fault("cdn_get", CutBody(2000, rst=True), times=None)
    refused(f"{kind}:{REPO}", "downloading 'org/net'", "closed the connection", "run the same command again")
    server.clear_faults()
    load_teacher(f"{kind}:{REPO}", device=CPU)


def test_an_incomplete_cache_is_not_accepted_as_a_download(server, monkeypatch, timm_folder):
    fast_retries(monkeypatch)
    create(server, timm_folder)
    huggingface_hub.hf_hub_download(REPO, "config.json")
    server.fault("tree", Status(500), times=None)  # the client falls back to its cache
    refused(f"hf-hub:{REPO}", "downloaded without model.safetensors", "run again")


def test_a_cache_that_cannot_record_the_revision_still_loads(server, monkeypatch, timm_folder, caplog):
    def full(*_):
        raise OSError("No space left on device")

    commit = create(server, timm_folder)
    monkeypatch.setattr(download, "write_bytes", full)
    assert load_teacher(f"hf-hub:{REPO}", device=CPU).revision == commit
    assert "cannot record in the cache that 'main'" in caplog.text
