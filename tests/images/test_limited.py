"""`data.images_per_class`: only the images that are needed are read."""
# ruff: noqa: F811

import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_fixtures import hub  # noqa: F401
from pipeline import random_picture

from prism_hf.errors import DataError
from prism_hf.images import load_source
from prism_hf.images.open_source import open_split
from prism_hf.recipe import DataRecipe

NAMES = ["ant", "bee", "cat"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


def encoded(seed):
    buffer = io.BytesIO()
    random_picture(16, 16, seed=seed).save(buffer, "png")
    return buffer.getvalue()


def table(labels, first):
    """Return a Parquet table of images, as bytes; rows have different pixels."""
    cells = [{"bytes": encoded(first + i), "path": None} for i in range(len(labels))]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": labels}, schema=FEATURES.arrow_schema), buffer)
    return buffer.getvalue()


def shards(split, count, rows=12):
    generator = np.random.default_rng(0)
    return {
        f"data/{split}-{i:05d}-of-{count:05d}.parquet": table(
            [0, 1, 2, *generator.integers(3, size=rows - 3).tolist()], 100 * i + 10_000 * (split == "test")
        )
        for i in range(count)
    }


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def counts(split):
    return np.bincount(split.labels, minlength=3).tolist()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_the_first_images_of_each_class_of_local_tables(tmp_path, own_cache):
    folder = tmp_path / "set"
    write(folder, shards("train", 4) | shards("test", 2))
    recipe = DataRecipe(source=str(folder), num_classes=3, size=16, images_per_class=2)
    data = load_source(recipe)
    assert counts(data.train) == [2, 2, 2]
    assert len(data.test) == 24, "the test split is complete"
    whole = load_source(DataRecipe(source=str(folder), num_classes=3, size=16))
    first = [np.flatnonzero(whole.train.labels == label)[:2] for label in range(3)]
    rows = np.sort(np.concatenate(first))
    assert np.array_equal(data.train.images(range(6)), whole.train.images(rows))
    assert load_source(recipe).train.content == data.train.content
    part = load_source(DataRecipe(source=str(folder), num_classes=2, size=16, images_per_class=2, classes=("cat", "ant")))
    assert counts(part.train)[:2] == [2, 2]
    many = load_source(DataRecipe(source=str(folder), num_classes=3, size=16, images_per_class=1000))
    assert len(many.train) == 48, "a class with fewer images has all of them"


def test_only_the_drawn_files_of_a_folder_are_opened(tmp_path):
    folder = tmp_path / "photos"
    files = {f"{split}/{name}/{i}.png": encoded(i) for split in ("train", "test") for name in NAMES for i in range(20)}
    write(folder, files)
    recipe = DataRecipe(source=str(folder), num_classes=3, size=16, images_per_class=3)
    drawn = load_source(recipe).train
    assert counts(drawn) == [3, 3, 3]
    kept = {drawn.where(row).partition("(")[2].rstrip(")") for row in range(9)}
    assert kept != {str(folder / f"train/{name}/{i}.png") for name in NAMES for i in range(3)}, "not the first files"
    for path in (folder / "train").rglob("*.png"):
        if str(path) not in kept:
            path.write_bytes(b"damaged")
    again = load_source(recipe).train
    assert again.content == drawn.content


@pytest.mark.parametrize("kind", ["digits", "saved"])
def test_other_sources_are_limited_too(kind, tmp_path):
    source = "digits"
    if kind == "saved":
        digits = {name: load_split("digits", name) for name in ("train", "test")}
        datasets.DatasetDict(digits).save_to_disk(str(tmp_path / "set"))
        source = str(tmp_path / "set")
    data = load_source(DataRecipe(source=source, num_classes=10, size=8, images_per_class=4))
    assert np.bincount(data.train.labels).tolist() == [4] * 10
    assert len(data.test) == 450


def load_split(source, name):
    return open_split(DataRecipe(source=source, num_classes=10, size=8), name)


def test_labels_without_names_are_refused(tmp_path, own_cache):
    buffer = io.BytesIO()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    cells = [{"bytes": encoded(i), "path": None} for i in range(4)]
    pq.write_table(pa.table({"image": cells, "label": list("aabb")}, schema=features.arrow_schema), buffer)
    write(tmp_path / "set", {f"data/{split}-00000-of-00001.parquet": buffer.getvalue() for split in ("train", "test")})
    with pytest.raises(DataError, match="column 'label' is not a ClassLabel, so its classes are only known after"):
        load_source(DataRecipe(source=str(tmp_path / "set"), num_classes=2, size=16, images_per_class=1))


LOOK = """
import json, sys
from prism_hf.images import load_source
from prism_hf.images.open_source import open_split
from prism_hf.recipe import DataRecipe
data = load_source(DataRecipe(source=sys.argv[1], num_classes=3, size=16, images_per_class=int(sys.argv[2])))
print(json.dumps([len(data.train), len(data.test), data.revision, data.train.content]))
"""


def look(hub, tmp_path, source, count=2, user="bob", offline=False):
    environment = hub.env(token=None if user is None else f"hf_{user}", home=tmp_path / "home", xet=False)
    environment |= {"HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", LOOK, source, str(count)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def fetched(hub):
    paths = [request.path for request in hub.requests if request.method == "GET" and ".parquet" in request.path]
    return {path.rpartition("/")[2].partition("?")[0] for path in paths}


@pytest.mark.slow
def test_a_hub_source_is_streamed_until_there_are_enough_and_then_cached(hub, tmp_path):
    hub.add_user("bob", token="hf_bob")
    files = shards("train", 30) | shards("test", 2)
    hub.create("datasets", "bob/photos", files=files)
    done = look(hub, tmp_path, "bob/photos")
    assert not done.returncode, done.stderr
    first = json.loads(done.stdout.splitlines()[-1])
    assert first[:2] == [6, 24]
    train = {name for name in fetched(hub) if name.startswith("train")}
    assert 1 <= len(train) <= 4, "the later shards of the training split are not touched"
    hub.requests.clear()
    again = json.loads(look(hub, tmp_path, "bob/photos").stdout.splitlines()[-1])
    assert again == first
    assert len(fetched(hub)) <= 1, "without a card, the first file has the schema; the images are in the cache"
    hub.requests.clear()
    offline = json.loads(look(hub, tmp_path, "bob/photos", offline=True).stdout.splitlines()[-1])
    assert offline == first
    assert not hub.requests
    assert len(first[2]) == 40
    more = json.loads(look(hub, tmp_path, "bob/photos", 30).stdout.splitlines()[-1])
    assert more[0] == 90


@pytest.mark.slow
@pytest.mark.parametrize("user", [None, "eve"])
def test_a_gated_source_says_in_one_line_how_to_get_access(hub, tmp_path, user):
    hub.add_user("ann", token="hf_ann")
    hub.add_user("eve", token="hf_eve")
    hub.create("datasets", "ann/photos", files=shards("train", 2) | shards("test", 1), gated="auto")
    done = look(hub, tmp_path, "ann/photos", user=user)
    line = done.stderr.strip().splitlines()[-1]
    assert "DataError: data.source 'ann/photos' is gated: accept its terms at" in line
    assert "hf auth login" in line
