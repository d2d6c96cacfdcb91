"""The test Hub: it works with the real clients, and its faults have the described effect."""

# ruff: noqa: F811  (fixtures are imported under the names that the tests use)

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from hub_fixtures import fast_retries, hub, online, transport  # noqa: F401
from hub_server import CutBody, Delay, HubServer, LostAnswer, Reset, ResetMidBody, Rival, Status
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ID = "lab/set"
NOISE = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(10_000))
FILES = {"data/a.parquet": NOISE[:300_000], "data/b.parquet": NOISE[:40_000], "card/x.json": b"{}", "e.bin": b""}

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.add_user("ann", orgs=["lab"]))


def adds(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def publish(api: HfApi, operations: list, **options) -> str:
    return api.create_commit(ID, operations, commit_message="m", repo_type="dataset", **options).oid


def download(api: HfApi, path: str, folder: Path) -> bytes:
    return Path(api.hf_hub_download(ID, path, repo_type="dataset", cache_dir=folder)).read_bytes()


def kinds(hub: HubServer) -> Counter[str]:
    return Counter(request.kind for request in hub.requests)


def status(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def test_publishing_and_reading_back(hub: HubServer, api: HfApi, transport: str, tmp_path: Path) -> None:
    hub.multipart_above, hub.part_size, hub.page_size = 200_000, 90_000, 2
    assert api.whoami()["orgs"] == [{"type": "org", "name": "lab", "roleInOrg": "write"}]
    assert api.create_repo(ID, repo_type="dataset", private=True).repo_id == ID
    assert api.create_repo(ID, repo_type="dataset", exist_ok=True).repo_id == ID
    first = api.repo_info(ID, repo_type="dataset").sha
    operations = adds(FILES)
    for operation in operations:
        api.preupload_lfs_files(ID, [operation], repo_type="dataset")
    second = publish(api, operations, parent_commit=first)
    assert hub.history("datasets", ID) == [second, first]
    assert {path: data for path, data in hub.files("datasets", ID).items() if path in FILES} == FILES
    used = kinds(hub)
    assert (used["lfs_put"], used["lfs_complete"], used["xet_xorb"] > 0) == ((5, 1, False), (0, 0, True))[
        transport == "xet"
    ]

    assert status(lambda: publish(api, adds({"c.txt": b"c"}), parent_commit=first)) == 412
    third = publish(
        api, [*adds({"c.txt": b"c"}), CommitOperationDelete("card/", is_folder=True), CommitOperationDelete("e.bin")]
    )
    assert publish(api, adds({"c.txt": b"c", "data/b.parquet": FILES["data/b.parquet"]})) == third  # nothing changed
    with pytest.raises(RemoteEntryNotFoundError):
        publish(api, [CommitOperationDelete("card/x.json")])

    listed = {entry.path: entry for entry in api.list_repo_tree(ID, repo_type="dataset", recursive=True, expand=True)}
    assert sorted(listed) == [".gitattributes", "c.txt", "data", "data/a.parquet", "data/b.parquet"]
    large = listed["data/a.parquet"]
    assert (large.size, large.lfs.sha256) == (300_000, hashlib.sha256(FILES["data/a.parquet"]).hexdigest())
    assert large.last_commit.oid == second
    assert (large.xet_hash is not None) == (transport == "xet")
    assert api.get_paths_info(ID, ["data/b.parquet", "no"], repo_type="dataset")[0].size == 40_000
    assert [commit.commit_id for commit in api.list_repo_commits(ID, repo_type="dataset")] == [third, second, first]
    for path in ("data/a.parquet", "data/b.parquet", "c.txt"):
        assert download(api, path, tmp_path) == hub.files("datasets", ID)[path]
    with pytest.raises(RemoteEntryNotFoundError):
        download(api, "no.txt", tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(ID, repo_type="dataset", revision="no")
    with pytest.raises(ValueError, match="Invalid metadata"):
        publish(api, adds({"README.md": b"---\na: [\n---\n"}))
    api.delete_repo(ID, repo_type="dataset")
    assert not hub.exists("datasets", ID)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(ID, repo_type="dataset")


def test_a_model_folder_is_uploaded_and_downloaded(hub: HubServer, api: HfApi, transport: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(NOISE[:5_000])
    (tmp_path / "m" / "config.json").write_bytes(b"{}")
    api.create_repo("ann/net")
    oid = api.upload_folder(repo_id="ann/net", folder_path=tmp_path / "m").oid
    assert hub.history("models", "ann/net")[0] == oid
    copy = Path(api.snapshot_download("ann/net", cache_dir=tmp_path / "c"))
    assert (copy / "model.safetensors").read_bytes() == NOISE[:5_000]
    info = api.model_info("ann/net", files_metadata=True)
    assert {each.rfilename: each.size for each in info.siblings}["model.safetensors"] == 5_000


def test_branches_and_pull_requests(hub: HubServer, api: HfApi, transport: str) -> None:
    hub.create("datasets", ID, {"a.txt": b"a", "b.bin": b"b"})
    api.create_branch(ID, repo_type="dataset", branch="v1")
    assert status(lambda: api.create_branch(ID, repo_type="dataset", branch="v1")) == 409
    publish(api, adds({"v.txt": b"v"}), revision="v1")
    assert "v.txt" in hub.files("datasets", ID, "v1")
    assert "v.txt" not in hub.files("datasets", ID)

    draft = api.create_pull_request(ID, "Draft", repo_type="dataset")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/1")
    publish(api, [*adds({"new.bin": NOISE[:9_000]}), CommitOperationDelete("a.txt")], revision="refs/pr/1")
    assert status(lambda: api.merge_pull_request(ID, 1, repo_type="dataset")) == 400
    api.change_discussion_status(ID, 1, "open", repo_type="dataset")
    hub.commit("datasets", ID, {"other.txt": b"o"})
    api.merge_pull_request(ID, 1, repo_type="dataset")
    merged = api.get_discussion_details(ID, 1, repo_type="dataset")
    assert (merged.status, merged.merge_commit_oid) == ("merged", hub.history("datasets", ID)[0])
    assert set(hub.files("datasets", ID)) == {".gitattributes", "b.bin", "new.bin", "other.txt"}

    stranger = HfApi(endpoint=hub.url, token=hub.add_user("eve"))
    assert status(lambda: publish(stranger, adds({"c.bin": b"x"}))) == 403
    done = stranger.create_commit(ID, adds({"b.bin": b"x"}), commit_message="m", repo_type="dataset", create_pr=True)
    assert (done.pr_revision, hub.files("datasets", ID, "refs/pr/2")["b.bin"]) == ("refs/pr/2", b"x")
    hub.commit("datasets", ID, {"b.bin": b"y"})
    assert api.get_discussion_details(ID, 2, repo_type="dataset").conflicting_files == ["b.bin"]
    assert status(lambda: api.merge_pull_request(ID, 2, repo_type="dataset")) == 409
    api.change_discussion_status(ID, 2, "closed", repo_type="dataset")
    listed = api.get_repo_discussions(ID, repo_type="dataset", discussion_status="closed", author="eve")
    assert [each.num for each in listed] == [2]
    refs = api.list_repo_refs(ID, repo_type="dataset", include_pull_requests=True)
    assert ([each.name for each in refs.branches], len(refs.pull_requests)) == (["main", "v1"], 2)


def test_permissions(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.create("datasets", "lab/secret", private=True)
    hub.create("datasets", "lab/gated", {"a.txt": b"a"}, gated="auto", granted=["bob"])
    reader = HfApi(endpoint=hub.url, token=hub.add_user("ann", token="hf_ann_reads", role="read", orgs=["lab"]))
    scope = {"entity": {"type": "dataset", "name": "lab/gated"}, "permissions": ["repo.write"]}
    fine = hub.add_user("ann", token="hf_fine", role="fineGrained", orgs=["lab"], fine_grained={"scoped": [scope]})
    eve, bob, nobody = (HfApi(endpoint=hub.url, token=token) for token in (hub.add_user("eve"), hub.add_user("bob"), False))
    fine = HfApi(endpoint=hub.url, token=fine)

    def answer(client: HfApi, id: str, *, write: bool = False) -> str:
        try:
            return client.auth_check(id, repo_type="dataset", write=write) or "yes"
        except HfHubHTTPError as error:
            return f"{type(error).__name__} {error.response.status_code}"

    assert [answer(each, "lab/secret") for each in (api, reader)] == ["yes", "yes"]
    assert answer(eve, "lab/secret") == answer(fine, "lab/secret") == "RepositoryNotFoundError 404"
    assert answer(nobody, "lab/secret") == "RepositoryNotFoundError 401"
    assert [answer(each, "lab/gated") for each in (api, bob, eve)] == ["yes", "yes", "GatedRepoError 403"]
    assert [answer(each, "lab/gated", write=True) for each in (api, fine)] == ["yes", "yes"]
    assert answer(reader, "lab/gated", write=True) == answer(eve, "lab/gated", write=True) == "HfHubHTTPError 403"
    assert answer(nobody, "lab/gated", write=True) == "HfHubHTTPError 401"

    assert nobody.dataset_info("lab/gated").sha
    with pytest.raises(GatedRepoError):
        nobody.get_hf_file_metadata(url=f"{hub.url}/datasets/lab/gated/resolve/main/a.txt")
    assert status(lambda: eve.create_repo("lab/mine", repo_type="dataset")) == 403
    assert status(lambda: reader.create_repo("ann/mine", repo_type="dataset")) == 403
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_no").whoami()
    assert fine.whoami()["auth"]["accessToken"]["fineGrained"] == {"scoped": [scope]}
    api.update_repo_settings("lab/secret", repo_type="dataset", private=False)
    assert answer(nobody, "lab/secret") == "yes"


TOLD = """
import hashlib, json, datasets
def told(rows):
    return hashlib.sha256(repr([(r["image"].tobytes(), r["label"], r["soft"]) for r in rows]).encode()).hexdigest()
"""
PUSH = """
from PIL import Image
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
                              "soft": datasets.List(datasets.List(datasets.Value("float16"), 3))})
rows = [{"image": Image.new("RGB", (8, 8), (n, 2, 3)), "label": n % 2, "soft": [[n, .5, .1]] * 2} for n in range(9)]
data = datasets.Dataset.from_list(rows, features=features)
data.push_to_hub("lab/set", config_name="one")
data.push_to_hub("lab/set", config_name="two", split="test", num_shards=3)
print(told(data))
"""
LOAD = """
told = [told(datasets.load_dataset("lab/set", name, split=split, streaming=streaming))
        for name, split in (("one", "train"), ("two", "test")) for streaming in (False, True)]
print(json.dumps({"told": told, "configs": datasets.get_dataset_config_names("lab/set")}))
"""


def run(program: str, hub: HubServer, home: Path, transport: str, token: str | None) -> str:
    environment = hub.env(token=token, home=home, xet=transport == "xet")
    done = subprocess.run([sys.executable, "-c", TOLD + program], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_pushed_dataset_loads_with_the_same_content(hub: HubServer, transport: str, tmp_path: Path) -> None:
    pushed = run(PUSH, hub, tmp_path / "a", transport, hub.add_user("ann", orgs=["lab"])).strip()
    loaded = json.loads(run(LOAD, hub, tmp_path / "b", transport, None))
    assert loaded == {"told": [pushed] * 4, "configs": ["one", "two"]}


def test_a_corrupted_bit_reaches_the_client(hub: HubServer, api: HfApi, transport: str, tmp_path: Path) -> None:
    files = {"a.parquet": NOISE[:50_000], "a.txt": b"text"}
    hub.create("datasets", ID)
    publish(api, adds(files))
    for path, data in files.items():
        hub.corrupt("datasets", ID, path)
        arrived = download(api, path, tmp_path)
        flipped = sum((one ^ two).bit_count() for one, two in zip(arrived, data, strict=True))
        assert (flipped, arrived == hub.files("datasets", ID)[path]) == (1, True)


def get(hub: HubServer, path: str, **options) -> httpx2.Response:
    return httpx2.get(hub.url + path, trust_env=False, **options)


def test_faults(hub: HubServer) -> None:
    data = NOISE[:100_000]
    hub.create("models", "lab/net", {"a.txt": data})
    path = "/lab/net/resolve/main/a.txt"
    fault = hub.fault(
        "resolve", Status(503, b"<h1>", {"Retry-After": "7"}, html=True), skip=1, times=2, match="GET /lab/net"
    )
    answers = [get(hub, path) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
    assert (answers[1].headers["Retry-After"], answers[1].headers["Content-Type"]) == ("7", "text/html")
    assert (fault.fired, hub.fired) == (2, 2)

    hub.fault("resolve", Reset(), times=None)
    for _ in range(3):
        with pytest.raises(httpx2.ReadError):
            get(hub, path)
    assert hub.requests[-1].status is None
    hub.clear_faults()
    for cut, error in ((CutBody(500), httpx2.RemoteProtocolError), (CutBody(500, rst=True), httpx2.ReadError)):
        hub.fault("resolve", cut)
        read: list[bytes] = []
        with httpx2.stream("GET", hub.url + path, trust_env=False) as answer, pytest.raises(error):
            read.extend(answer.iter_raw())
        assert (answer.headers["Content-Length"], b"".join(read)) == ("100000", data[:500])
    hub.fault("resolve", Delay(0.2))
    started = time.monotonic()
    assert get(hub, path, headers={"Range": "bytes=10-19"}).content == data[10:20]
    assert time.monotonic() - started > 0.2


def test_faults_during_a_publication(hub: HubServer, api: HfApi, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_retries(monkeypatch)
    first = hub.create("datasets", ID).at("main").oid
    upload = {"lfs": "lfs_put", "xet": "xet_xorb"}[transport]
    mid = hub.fault(upload, ResetMidBody(1000))
    busy = hub.fault("preupload", Status(503))
    late = hub.fault("commit", LostAnswer())
    operations = adds({"a.bin": NOISE})
    with pytest.raises(httpx2.TransportError):
        publish(api, operations, parent_commit=first)
    assert (mid.fired, busy.fired, late.fired) == (1, 1, 1)
    tries = {kind: [each.status for each in hub.requests if each.kind == kind] for kind in (upload, "preupload", "commit")}
    assert tries == {upload: [None, 200], "preupload": [503, 200], "commit": [None]}
    assert hub.files("datasets", ID)["a.bin"] == NOISE
    assert len(hub.history("datasets", ID)) == 2
    assert publish(api, adds({"a.bin": NOISE})) == hub.history("datasets", ID)[0]

    hub.fault("commit", Rival(lambda: hub.commit("datasets", ID, {"r.txt": b"r"})))
    head = hub.history("datasets", ID)[0]
    assert status(lambda: publish(api, adds({"a.bin": NOISE[:99]}), parent_commit=head)) == 412
    assert "r.txt" in hub.files("datasets", ID)


def test_objects_must_be_uploaded_first(hub: HubServer, api: HfApi) -> None:
    hub.create("datasets", ID)
    header = {"key": "header", "value": {"summary": "s"}}
    file = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}}
    body = "\n".join(map(json.dumps, (header, file)))
    url, token = f"{hub.url}/api/datasets/{ID}/commit/main", {"Authorization": f"Bearer {api.token}"}
    assert httpx2.post(url, content=body, headers=token, trust_env=False).status_code == 400
    assert len(hub.history("datasets", ID)) == 1
    assert httpx2.post(url, content=json.dumps(header), headers=token, trust_env=False).status_code == 200
    assert len(hub.history("datasets", ID)) == 2


def test_unknown_requests_and_leaked_tokens_are_recorded(hub: HubServer) -> None:
    assert get(hub, "/api/spaces/lab/x").status_code == 501
    assert [request.path for request in hub.unknown] == ["/api/spaces/lab/x"]
    hub.unknown.clear()
    secret = {"Authorization": f"Bearer {hub.add_user('ann')}"}
    httpx2.put(f"{hub.cdn_url}/lfs/{hashlib.sha256(b'x').hexdigest()}", content=b"x", headers=secret, trust_env=False)
    assert [request.kind for request in hub.leaks] == ["lfs_put"]
    hub.requests.clear()
