# ruff: noqa: F811
"""Round trips through the Hub: a new process with an empty cache loads a pushed dataset and finds the same bits."""

import hashlib
import json
import subprocess
import sys

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import Rival, Status
from huggingface_hub import ModelCard
from pipeline import add_card, one_line, random_picture, small_set, tiny

from prism_hf.cli.main import main
from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import HubError
from prism_hf.images.source import load_source
from prism_hf.models.squeeze import squeeze_teacher, teacher_folder

SET, TEACHER = "org/small-set", "org/small-teacher"

FRESH = """
import hashlib, json, sys
import datasets, numpy as np

def digest(rows):
    out = {}
    for column in rows.column_names:
        if column == "image":
            blobs = [cell["bytes"] for cell in rows.cast_column("image", datasets.Image(decode=False))["image"]]
            out[column] = hashlib.sha256(b"".join(blobs)).hexdigest()
        else:
            values = rows.with_format("arrow")[:][column].combine_chunks()
            values = values.flatten() if hasattr(values, "flatten") else values
            out[column] = [str(values.type), hashlib.sha256(values.to_numpy(zero_copy_only=False).tobytes()).hexdigest()]
    return out

def streamed(rows):
    out = {}
    for row in rows:  # read to the end: leaving a stream early can abort the interpreter
        for key, value in row.items():
            kind = np.float16 if key == "teacher_logits" else np.float64
            out.setdefault(key, hashlib.sha256()).update(np.asarray(value, kind).tobytes())
    return {key: value.hexdigest() for key, value in out.items()}
"""

LOAD = (
    FRESH
    + """
repo, old = sys.argv[1:]
images = datasets.load_dataset(repo)["train"]
views = datasets.load_dataset(repo, "views", split="train")
print(json.dumps({
    "configs": datasets.get_dataset_config_names(repo),
    "names": images.features["label"].names,
    "images": digest(images),
    "views": digest(views),
    "streamed": streamed(datasets.load_dataset(repo, "views", streaming=True)["train"]),
    "old": digest(datasets.load_dataset(repo, revision=old, split="train")),
    "ours": "prism_hf" in sys.modules,
}))
"""
)

MODEL = """
import json, sys
import timm, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

repo, file = sys.argv[1:]
names = {"timm": timm.create_model(f"hf-hub:{repo}", pretrained=True).eval()}
names["transformers"] = AutoModelForImageClassification.from_pretrained(repo).eval()
x = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
with torch.no_grad():
    logits = {"timm": names["timm"](x), "transformers": names["transformers"](x).logits}
told = pipeline("image-classification", model=repo, device="cpu")(file)
print(json.dumps({key: value[0].tolist() for key, value in logits.items()} | {"pipeline": told}))
"""


def fresh(hub, home, transport, code, *args):
    env = hub.env(token="hf_readers", home=home, xet=transport == "xet")
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def reader(connected, tmp_path):
    """Add a member of the organization with a read token, and return a new home folder."""
    connected.add_user("rita", token="hf_readers", role="read", orgs=(("org", "read"),))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def here(folder, config):
    """Return the same digests of the pushed files, read only with pyarrow."""
    space = {"datasets": datasets, "np": np, "hashlib": hashlib}
    exec(FRESH, space)  # noqa: S102
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / config).glob("train-*.parquet")))
    rows = datasets.Dataset(table)
    if "image" in rows.column_names:
        rows = rows.cast_column("image", datasets.Image())
    return space["digest"](rows), space["streamed"]


def test_a_pushed_dataset_comes_back_bit_for_bit(connected, transport, reader, tmp_path):
    pushed = []
    for number, channels in ((0, 1), (1, 3)):
        folder = tmp_path / f"set-{number}"
        names = ["ant", "<b>bee</b>", "c|at", "d`o`g: #1"]
        recipe, *_ = small_set(folder, seed=number, channels=channels, names=names, epochs=4 - number, shard_mb=1)
        add_card(folder, recipe, names)
        assert main(["push", str(folder), SET]) == 0
        pushed.append((folder, connected.history("datasets", SET)[0]))
    (older, commit), (newer, _) = pushed
    found = fresh(connected, reader, transport, LOAD, SET, commit)
    assert found["configs"] == ["default", "views"]
    assert found["names"] == names
    assert not found["ours"]
    assert found["images"] == here(newer, "data")[0]
    views, streamed = here(newer, "views")
    assert found["views"] == views
    assert found["streamed"] == streamed(datasets.Dataset(pq.read_table(newer / "views" / "train-00000-of-00001.parquet")))
    assert found["old"] == here(older, "data")[0]
    assert found["images"]["teacher_logits"][0] == "halffloat"
    kinds = {r.kind for r in connected.requests}
    assert ("xet_reconstruction" in kinds) == (transport == "xet")


def test_verify_detects_a_flipped_bit_on_the_hub(connected, tmp_path, capsys):
    folder = tmp_path / "set"
    recipe, names, *_ = small_set(folder)
    add_card(folder, recipe, names)
    assert main(["push", str(folder), SET]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{connected.url}/datasets/{SET}/commit/")
    assert main(["verify", SET]) == 0
    assert "12 rows in 'default', 36 rows in 'views'; no differences" in capsys.readouterr().out
    connected.corrupt("datasets", SET, "views/train-00000-of-00001.parquet")
    assert main(["verify", SET]) == 1
    assert "views/train-00000-of-00001.parquet: content has changed" in capsys.readouterr().out


def test_verify_detects_missing_and_unlisted_files_on_the_hub(connected, tmp_path, capsys):
    folder = tmp_path / "set"
    recipe, names, *_ = small_set(folder)
    add_card(folder, recipe, names)
    assert main(["push", str(folder), SET]) == 0
    connected.commit("datasets", SET, {"data/train-00001-of-00002.parquet": b"PAR1"}, ["recipe.yaml"])
    assert main(["verify", SET]) == 1
    told = capsys.readouterr().out
    assert "recipe.yaml: missing" in told
    assert "'data/train-00001-of-00002.parquet': provenance.json does not list it" in told
    assert main(["verify", "org/nothing"]) == 2
    assert "is not on the Hub" in capsys.readouterr().err


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    recipe, root = tiny("data.size=16", "squeeze.batch_size=256"), tmp_path_factory.mktemp("teachers")
    squeeze_teacher("squeeze:test_byobnet", recipe, load_source(recipe.data), root, device=torch.device("cpu"))
    return teacher_folder("squeeze:test_byobnet", recipe, root)


def test_a_pushed_teacher_loads_in_timm_and_transformers(connected, transport, reader, teacher, tmp_path):
    picture = tmp_path / "digit.png"
    random_picture(16, 16).save(picture)
    assert main(["push", str(teacher), TEACHER]) == 0
    found = fresh(connected, reader, transport, MODEL, TEACHER, str(picture))
    with torch.no_grad():
        x = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
        expected = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()(x)[0]
    for client in ("timm", "transformers"):
        torch.testing.assert_close(torch.tensor(found[client]), expected, rtol=1e-5, atol=1e-5)
    assert {entry["label"] for entry in found["pipeline"]} <= set("0123456789")
    card = ModelCard(connected.files("models", TEACHER)["README.md"].decode())
    assert card.data.library_name == "timm"
    assert card.data.eval_results[0].metric_value == json.loads((teacher / "squeeze.json").read_text())["test_top1"]
    assert main(["push", str(teacher), TEACHER]) == 0
    assert len(connected.history("models", TEACHER)) == 2, "a push without changes made a commit"


# -- read with load_distilled -----------------------------------------------------------------------------------------

DISTILLED = """
import json, sys
from prism_hf.dataset.reader import load_distilled
print(json.dumps(load_distilled(sys.argv[1]).content))
"""
lfs_only = pytest.mark.parametrize("transport", ["lfs"], indirect=True)


@pytest.mark.slow
@lfs_only
def test_a_push_during_a_download_is_not_mixed_in(connected, transport, reader, tmp_path):
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / f"set-{seed}")
        recipe, names, *_ = small_set(folders[-1], seed=seed)
        add_card(folders[-1], recipe, names)
    assert main(["push", str(folders[0]), SET]) == 0
    newer = {p.relative_to(folders[1]).as_posix(): p.read_bytes() for p in folders[1].rglob("*") if p.is_file()}
    # Another push happens when the first table is requested.
    fault = connected.fault("resolve", Rival(lambda: connected.commit("datasets", SET, newer)), match="data/train")
    found = fresh(connected, reader, transport, DISTILLED, SET)
    assert fault.fired
    assert found == load_distilled(folders[0]).content


@pytest.fixture
def cache(connected, tmp_path, monkeypatch):
    """Return the path of an empty Hub cache, and skip waiting times."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pushed(connected, tmp_path):
    """Push a dataset folder, add other files to its repo, and return the folder."""
    recipe, names, *_ = small_set(tmp_path / "set")
    add_card(tmp_path / "set", recipe, names)
    assert main(["push", str(tmp_path / "set"), SET]) == 0
    connected.commit(
        "datasets", SET, {"data/test-00000-of-00001.parquet": b"x", "data/train-more.pkl": b"x", "a.bin": b"x"}
    )
    return tmp_path / "set"


def test_load_distilled_reads_a_pushed_dataset_and_downloads_nothing_else(connected, transport, pushed, cache):
    here, there = load_distilled(pushed), load_distilled(SET)
    for name in ("content", "num_epochs", "class_names", "recipe", "teacher_weights", "image_bytes", "label_bytes"):
        assert getattr(here, name) == getattr(there, name)
    assert torch.equal(here.images_uint8, there.images_uint8)
    assert torch.equal(here.epoch(2)[1], there.epoch(2)[1])
    (snapshot,) = cache.glob("datasets--org--small-set/snapshots/*")
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.*")}
    tables = {f"{name}/train-00000-of-00001.parquet" for name in ("data", "views")}
    assert names == tables | {"recipe.yaml", "provenance.json"}


@lfs_only
def test_load_distilled_works_offline_from_the_hub_cache(connected, pushed, cache, monkeypatch):
    content = load_distilled(SET).content
    commit = connected.history("datasets", SET)[0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(connected.requests)
    assert load_distilled(SET).content == content
    assert load_distilled(SET, revision=commit).content == content
    assert len(connected.requests) == before
    for path in cache.rglob("views/*.parquet"):
        path.unlink()
    for source, revision in ((SET, None), (SET, "v9"), ("org/another", None)):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE") as error:
            load_distilled(source, revision=revision)
        assert source in one_line(error)


@lfs_only
def test_a_revision_stays_fixed_and_a_newer_push_is_seen(connected, pushed, cache, tmp_path):
    first, commit = load_distilled(SET).content, connected.history("datasets", SET)[0]
    recipe, names, *_ = small_set(tmp_path / "newer", seed=1)
    add_card(tmp_path / "newer", recipe, names)
    assert main(["push", str(tmp_path / "newer"), SET]) == 0
    assert load_distilled(SET).content == load_distilled(tmp_path / "newer").content != first
    assert load_distilled(SET, revision=commit).content == first


@lfs_only
@pytest.mark.parametrize("kind", ["missing", "private", "gated", "revision"])
def test_an_unavailable_hub_dataset_gives_one_error_line(connected, cache, kind):
    connected.create("datasets", "other/private", {"a": b"1"}, private=True)
    connected.create("datasets", "other/gated", {"data/train-00000-of-00001.parquet": b"1"}, gated=True)
    connected.create("datasets", SET, {"a": b"1"})
    source = SET if kind == "revision" else f"other/{kind}"
    with pytest.raises(HubError) as error:
        load_distilled(source, revision="v9" if kind == "revision" else None)
    assert source in one_line(error)
    assert ("403" if kind == "gated" else "404") in str(error.value)


@lfs_only
def test_a_hub_outage_is_an_error_and_not_an_old_copy_or_a_missing_file(connected, pushed, cache):
    content = load_distilled(SET).content
    fault = connected.fault("repo_info", Status(503), times=None)
    with pytest.raises(HubError, match="5 times"):
        load_distilled(SET)
    fault.times = fault.fired
    assert load_distilled(SET).content == content
    connected.commit("datasets", SET, {"recipe.yaml": b"name: newer\n"})
    connected.fault("resolve", Status(502), match="recipe.yaml", times=None)
    with pytest.raises(HubError):
        load_distilled(SET)


@lfs_only
def test_load_distilled_works_offline_from_tables_that_datasets_downloaded(connected, pushed, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", connected.url)
    for config in ("default", "views"):
        datasets.load_dataset(SET, config, cache_dir=str(tmp_path / "tables"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_distilled(SET).content == load_distilled(pushed).content
