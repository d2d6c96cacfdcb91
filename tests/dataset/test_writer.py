import hashlib
import json
import subprocess
import textwrap

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pipeline import PYTHON, add_card, quiet_env, sha_tree, small_set

from prism_hf.dataset.format import image_features, view_features
from prism_hf.dataset.reader import load_distilled
from prism_hf.hub.dataset_card import REPLAY
from prism_hf.images.pixels import decode

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    made = small_set(folder, channels=3, names=NAMES)
    add_card(folder, made[0], made[1])
    return folder, *made


# -- an independent reader, with plain `datasets` ---------------------------------------------------------------------

OUTSIDER = """
import hashlib, json, sys
import numpy as np
from datasets import get_dataset_config_names, load_dataset

def plain(row):
    return str({key: value.tobytes() if key == "image" else value for key, value in row.items()})

folder, out = sys.argv[1], {}
out["configs"] = sorted(get_dataset_config_names(folder))
images = load_dataset(folder, split="train")
assert images.features == load_dataset(folder, "default", split="train").features
out["names"] = images.features["label"].names
out["labels"] = images["label"][:]
out["slots"] = images["slot"][:]
out["pixels"] = hashlib.sha256(b"".join(np.asarray(image).tobytes() for image in images["image"])).hexdigest()
logits = images.with_format("numpy", columns=["teacher_logits"], dtype=np.float16)[:]["teacher_logits"]
out["logits"] = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()
out["columns"] = images.column_names
out["rows"] = {}
for config in ("default", "views"):
    whole = load_dataset(folder, config, split="train")
    stream = load_dataset(folder, config, split="train", streaming=True)
    rows = list(stream)
    assert stream.features == whole.features, config
    assert [plain(row) for row in rows] == [plain(row) for row in whole], config
    out["rows"][config] = len(rows)
views = load_dataset(folder, "views", split="train")
out["views"] = {name: views[name][:] for name in views.column_names if name != "teacher_logits"}
out["view_logits"] = [[float(x) for x in row] for row in views["teacher_logits"]]
out["ours"] = [name for name in sys.modules if name.split(".")[0] == "prism_hf"]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def outsider(packed):
    done = subprocess.run(
        [PYTHON, "-c", OUTSIDER, str(packed[0])], capture_output=True, text=True, env=quiet_env(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_datasets_loads_and_streams_both_configs_without_prism(outsider, packed):
    assert outsider["ours"] == []
    assert outsider["configs"] == ["default", "views"]
    assert outsider["columns"] == ["image", "label", "slot", "teacher_logits", "job"]
    assert outsider["rows"] == {"default": 12, "views": 36}
    assert outsider["names"] == NAMES


def test_images_and_labels_come_back_bit_for_bit(outsider, packed):
    _, _, _, table, _, shown = packed
    pixels = b"".join(np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes() for image in shown)
    assert outsider["pixels"] == hashlib.sha256(pixels).hexdigest()
    assert outsider["logits"] == hashlib.sha256(table.teacher_logits.numpy().tobytes()).hexdigest()
    assert outsider["labels"] == table.labels.tolist() == [c for c in range(4) for _ in range(3)]
    assert outsider["slots"] == table.slots.tolist() == [0, 1, 2] * 4


def test_views_come_back_bit_for_bit(outsider, packed):
    views = packed[4]
    whole = {key: np.concatenate([epoch[key] for epoch in views]) for key in views[0]}
    for name, values in outsider["views"].items():
        assert np.array_equal(np.asarray(values, dtype=whole[name].dtype), whole[name]), name
    assert np.array_equal(np.asarray(outsider["view_logits"], dtype=np.float16), whole["teacher_logits"])


# -- our own reader ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_format", "extension"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_image_bytes_are_stored_verbatim(tmp_path, image_format, extension):
    _, _, table, _, shown = small_set(tmp_path, channels=3, image_format=image_format)
    cells = pq.read_table(tmp_path / "data" / "train-00000-of-00001.parquet")["image"].to_pylist()
    assert [cell["bytes"] for cell in cells] == table.encoded
    assert [cell["path"] for cell in cells] == [f"{i:06d}.{extension}" for i in range(12)]
    assert all(torch.equal(decode(cell["bytes"], 3), image) for cell, image in zip(cells, shown, strict=True))


def test_tables_contain_their_features_even_without_a_card(tmp_path):
    _, names, *_ = small_set(tmp_path)
    for sub, features in (("data", image_features(names)), ("views", view_features(4))):
        loaded = datasets.Dataset.from_parquet(str(tmp_path / sub / "train-00000-of-00001.parquet"))
        assert loaded.features == features


def test_logits_are_byte_split_and_images_are_not(tmp_path):
    small_set(tmp_path)
    group = pq.ParquetFile(tmp_path / "data" / "train-00000-of-00001.parquet").metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["image.bytes"].compression == "UNCOMPRESSED"
    logits = next(column for path, column in columns.items() if path.startswith("teacher_logits"))
    assert "BYTE_STREAM_SPLIT" in logits.encodings
    assert logits.compression == "ZSTD"


@pytest.mark.parametrize("name", ["naïve é", "a, b", "a|b", "'quoted\"", "鹤", "-", "1", "null"])
def test_class_names_are_preserved(tmp_path, name):
    recipe, names, *_ = small_set(tmp_path, names=[name, "other"])
    add_card(tmp_path, recipe, names)
    assert load_distilled(tmp_path).class_names == (name, "other")


def test_small_shards_hold_the_same_rows(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kinds = {"ipc": 3, "classes": 300, "epochs": 5, "channels": 3, "size": 16}
    for folder, shard_mb in ((whole, 500), (cut, 1)):
        recipe, names, *_ = small_set(folder, shard_mb=shard_mb, **kinds)
        add_card(folder, recipe, names)
    for sub in ("data", "views"):
        assert len(list((whole / sub).iterdir())) == 1
        shards = sorted(path.name for path in (cut / sub).iterdir())
        assert len(shards) > 1
        assert shards == [f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
        assert all(path.stat().st_size < 1.2e6 for path in (cut / sub).iterdir())
    one, two = load_distilled(whole), load_distilled(cut)
    assert torch.equal(one.images_uint8, two.images_uint8)
    assert torch.equal(one.teacher_logits, two.teacher_logits)
    assert torch.equal(one.epoch(4)[1], two.epoch(4)[1])
    stream = datasets.load_dataset(str(cut), "views", split="train", streaming=True)
    assert stream.num_shards == len(list((cut / "views").iterdir()))


def test_rewriting_gives_equal_bytes_and_removes_old_shards(tmp_path):
    kinds = {"classes": 300, "ipc": 3, "epochs": 5, "channels": 3, "size": 16}
    small_set(tmp_path, shard_mb=1, **kinds)
    many = sha_tree(tmp_path)
    small_set(tmp_path, **kinds)
    one = sha_tree(tmp_path)
    assert set(one) == {"recipe.yaml", "data/train-00000-of-00001.parquet", "views/train-00000-of-00001.parquet"}
    small_set(tmp_path, shard_mb=1, **kinds)
    assert sha_tree(tmp_path) == many


# -- replay by an independent reader ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_the_replay_code_in_the_card_equals_ours(tmp_path, mix, channels):
    recipe, names, *_ = small_set(tmp_path, channels=channels, mix=mix, epochs=4)
    add_card(tmp_path, recipe, names)
    outside = {}
    assert "prism" not in REPLAY
    exec(REPLAY, outside)
    images = datasets.load_dataset(str(tmp_path), split="train")
    views = datasets.load_dataset(str(tmp_path), "views", split="train")
    data = load_distilled(tmp_path)
    pixels = data.images_uint8.float() / 255
    ours = torch.cat([data.epoch(e)[0].replay(pixels) for e in range(4)])
    theirs = torch.stack([outside["replay"](row, images) for row in views])
    assert theirs.shape == ours.shape == (48, channels, 12, 12)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    partners = [row["mix_image_index"] for row in views]
    assert (min(partners) >= 0) == (mix != "none")


def test_the_card_contains_the_replay_code(packed):
    assert REPLAY in (packed[0] / "README.md").read_text(encoding="utf-8")


def test_the_code_in_the_card_loads_and_trains(tmp_path):
    recipe, names, *_ = small_set(tmp_path, channels=1, size=32, names=NAMES, ipc=25)
    add_card(tmp_path, recipe, names)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace(f"ORG/{recipe.name}", str(tmp_path))
    outside = {}
    exec(code, outside)
    assert outside["loss"].isfinite()
    # Read to the end: leaving a stream early can abort the interpreter at exit (datasets#7357).
    assert sum(row["image_index"] < 100 for row in outside["views"]) == 300


def test_the_replay_code_is_short():
    assert len(textwrap.dedent(REPLAY).splitlines()) <= 20
