import errno
import hashlib
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pipeline import add_card, one_line, small_set

from prism_hf.dataset import reader as reading
from prism_hf.dataset import tables
from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import DataError, HubError
from prism_hf.images.pixels import encode
from prism_hf.images.views import from_columns

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("channels", "image_format"),
    [(1, "png"), (3, "png"), (3, "webp"), (1, "jpeg"), (3, "jpeg")],
)
def test_a_written_dataset_is_read_back(tmp_path, channels, image_format):
    recipe, names, table, views, shown = small_set(tmp_path, channels=channels, image_format=image_format)
    add_card(tmp_path, recipe, names)
    data = load_distilled(tmp_path)
    assert data.images_uint8.shape == (12, channels, 12, 12)
    assert torch.equal(data.images_uint8, shown)
    assert torch.equal(data.labels, table.labels)
    assert data.class_names == tuple(names)
    assert data.teacher_logits.dtype == torch.float16
    assert torch.equal(data.teacher_logits, table.teacher_logits)
    assert data.num_epochs == 3
    assert data.recipe == recipe
    for number, columns in enumerate(views):
        rows, logits = data.epoch(number)
        assert torch.equal(logits, torch.from_numpy(columns["teacher_logits"]))
        same_rows(rows, from_columns(columns))
    assert data.image_bytes == sum(map(len, table.encoded))
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    assert data.label_bytes == files - data.image_bytes


def sizes(folder, table, column=""):
    """Return the compressed size of each row group in bytes, from its metadata."""
    for path in sorted((folder / table).iterdir()):
        metadata = pq.read_metadata(path).to_dict()
        for group in metadata["row_groups"]:
            chunks = [chunk for chunk in group["columns"] if chunk["path_in_schema"].startswith(column)]
            yield sum(chunk["total_compressed_size"] for chunk in chunks)


@pytest.mark.parametrize("shard_mb", [500, 1], ids=["one file", "some files"])
def test_label_bytes_count_only_the_epochs_that_are_read(tmp_path, shard_mb):
    recipe, names, *_ = small_set(tmp_path, classes=300, ipc=4, epochs=4, size=8, shard_mb=shard_mb)
    add_card(tmp_path, recipe, names)
    assert len(list((tmp_path / "views").iterdir())) == (1 if shard_mb == 500 else 4)
    data, groups = load_distilled(tmp_path), list(sizes(tmp_path, "views"))
    assert len(groups) == 4
    assert data.view_bytes == [sum(groups[:epochs]) for epochs in range(5)]
    assert sum(groups) < data.label_bytes
    logits = sum(sizes(tmp_path, "data", "teacher_logits"))
    assert 0 < data.image_label_bytes == logits < 1200 * 300 * 2 * 1.1


def test_a_row_group_with_several_epochs_counts_in_full(tmp_path):
    recipe, names, *_ = small_set(tmp_path, epochs=4)
    (path,) = (tmp_path / "views").iterdir()
    pq.write_table(pq.read_table(path), path, row_group_size=30)  # 12 images: epochs 0, 1 and half of 2, and the rest
    add_card(tmp_path, recipe, names)
    data, (first, second) = load_distilled(tmp_path), sizes(tmp_path, "views")
    assert data.view_bytes == [0, first, first, first + second, first + second]


def foreign(folder, kind):
    if kind == "missing":
        return folder / "nothing"
    if kind == "hub id":
        return "nobody-there/no-such-set"
    if kind == "text":
        (folder / "notes.txt").write_text("hello")
    elif kind == "parquet":
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(folder / "train.parquet")
    elif kind == "other columns":
        for name in ("data", "views"):
            (folder / name).mkdir()
            datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(folder / name / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["missing", "hub id", "empty", "text", "parquet", "other columns"])
def test_a_foreign_folder_gives_a_one_line_error(tmp_path, kind):
    source = foreign(tmp_path, kind)
    with pytest.raises(HubError if kind == "hub id" else DataError) as error:
        load_distilled(source)
    assert str(source) in one_line(error)
    words = {
        "missing": "neither a folder here nor a Hub id; give a folder with data/ and views/, or a Hub id (org/name)",
        "hub id": "HF_HUB_OFFLINE",
        "other columns": "no column image, label, slot",
    }
    assert words.get(kind, "no file data/train-*.parquet; give a folder with data/ and views/") in str(error.value)


def test_missing_views_give_a_one_line_error(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    next((tmp_path / "views").iterdir()).unlink()
    with pytest.raises(DataError) as error:
        load_distilled(tmp_path)
    assert "table 'views' has no file views/train-*.parquet" in one_line(error)


@pytest.mark.parametrize("rows", [0, 11, 30])
def test_half_an_epoch_gives_a_one_line_error(tmp_path, rows):
    small_set(tmp_path)
    path = tmp_path / "views" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, rows), path)
    with pytest.raises(DataError) as error:
        load_distilled(tmp_path)
    assert f"table 'views' has {rows} rows for 12 images; expected whole epochs" in one_line(error)


# -- files ------------------------------------------------------------------------------------------------------------


def reshard(folder, name, files, group=4):
    """Rewrite a table with the given number of files and rows per row group."""
    paths = sorted((folder / name).glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    for path in paths:
        path.unlink()
    bounds = np.linspace(0, len(table), files + 1).astype(int).tolist()
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        shard = folder / name / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table.slice(start, stop - start), shard, row_group_size=group)


@pytest.fixture
def shards(tmp_path):
    """Twelve images in two files and three epochs in four files; no epoch ends where a file or a row group ends."""
    small_set(tmp_path)
    reshard(tmp_path, "data", 2, group=5)
    reshard(tmp_path, "views", 4, group=5)
    return tmp_path


def test_a_dataset_is_the_same_in_one_file_and_in_several(tmp_path):
    small_set(tmp_path / "one")
    one = load_distilled(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "some")
    reshard(tmp_path / "some", "data", 5)
    reshard(tmp_path / "some", "views", 7)
    some = load_distilled(tmp_path / "some")
    assert (one.content, one.num_epochs, one.image_bytes) == (some.content, some.num_epochs, some.image_bytes)
    assert torch.equal(one.images_uint8, some.images_uint8)
    for epoch in range(3):
        (rows, logits), (others, other_logits) = one.epoch(epoch), some.epoch(epoch)
        same_rows(rows, others)
        assert torch.equal(logits, other_logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: (f / "views" / "train-00001-of-00004.parquet").unlink(),
            "views/ is missing train-00001-of-00004.parquet;",
        ),
        (
            lambda f: [path.unlink() for path in (f / "views").glob("*-0000[123]-*")],
            "is missing train-00001-of-00004.parquet, train-00002-of-00004.parquet, train-00003-of-00004.parquet;",
        ),
        (
            lambda f: (f / "data" / "train-00000-of-00002.parquet").rename(f / "data" / "train-00000-of-09999.parquet"),
            "data/ contains train-00001-of-00002.parquet, expected train-NNNNN-of-09999.parquet",
        ),
        (lambda f: (f / "data" / "train-notes.txt").write_text("x"), "data/ contains train-notes.txt, expected"),
        (lambda f: (f / "data" / "train-00002-of-00002.parquet").mkdir(), "data/ contains train-00002-of-00002.parquet"),
        (
            lambda f: [path.rename(path.with_name(f"train-{path.name[6:11]}.parquet")) for path in (f / "data").iterdir()],
            "data/ contains train-00000.parquet, expected train-NNNNN-of-00002.parquet",
        ),
        (lambda f: (f / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1"), "is not readable as Parquet"),
        (
            lambda f: shutil.copy(
                f / "data" / "train-00000-of-00002.parquet", f / "views" / "train-00001-of-00004.parquet"
            ),
            "train-00001-of-00004.parquet' has other columns or types than the first file",
        ),
    ],
)
def test_a_one_line_error_names_missing_foreign_or_damaged_files(shards, change, words):
    change(shards)
    with pytest.raises(DataError) as error:
        load_distilled(shards)
    assert words in one_line(error)
    assert str(shards) in str(error.value)


@pytest.mark.parametrize("start", [4, 600])
def test_damage_inside_a_file_gives_a_one_line_error(tmp_path, start):
    small_set(tmp_path)
    (path,) = (tmp_path / "views").iterdir()
    data = bytearray(path.read_bytes())
    data[start : start + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not readable as Parquet") as error:
        load_distilled(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["data", "views"])
def test_damage_anywhere_gives_a_one_line_error_or_other_data_of_the_same_size(tmp_path, name):
    small_set(tmp_path, size=8)
    (path,) = (tmp_path / name).iterdir()
    good, random = path.read_bytes(), np.random.default_rng(3)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    refused = 0
    for start in [footer] * 100 + [0] * 20:
        data = bytearray(good)
        data[random.integers(start, len(good))] = random.integers(256)
        path.write_bytes(data)
        try:
            read = load_distilled(tmp_path)
        except DataError as error:
            one_line(error)
            refused += 1
        else:
            assert len(read.labels) == len(read.images_uint8) == len(read.teacher_logits) == 12
            assert [len(read.epoch(number)[1]) for number in range(3)] == [12] * 3
    assert 40 < refused < 120


def test_unrelated_files_are_ignored(shards):
    content = load_distilled(shards).content
    for name in ("data/test-00000-of-00001.parquet", "train-00000-of-00001.parquet", "LICENSE", "data/.train-x"):
        (shards / name).write_text("something else")
    assert load_distilled(shards).content == content


def without(table, name, row, part=None):
    """Return the table with a null in place of a cell, or of an element of its list."""
    values = table[name].to_pylist()
    if part is None:
        values[row] = None
    else:
        values[row][part] = None
    index, schema = table.schema.get_field_index(name), table.schema
    return table.set_column(index, schema.field(name), pa.array(values, type=schema.field(name).type))


@pytest.mark.parametrize(
    ("name", "column", "part"),
    [
        ("data", "label", None), ("data", "slot", None), ("data", "job", None), ("data", "teacher_logits", None),
        ("data", "teacher_logits", 2), ("views", "epoch", None), ("views", "crop", None), ("views", "crop", 3),
        ("views", "flip", None), ("views", "mix_weight", None), ("views", "teacher_logits", 0),
    ],
)  # fmt: skip
def test_a_missing_value_gives_a_one_line_error(tmp_path, name, column, part):
    small_set(tmp_path)
    (path,) = (tmp_path / name).iterdir()
    pq.write_table(without(pq.read_table(path), column, 7, part), path)
    with pytest.raises(DataError) as error:
        load_distilled(tmp_path)
    assert f"column {column!r} has rows without a value" in one_line(error)


def test_neither_card_nor_recipe_nor_provenance_is_needed(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    content = load_distilled(tmp_path).content
    for name in ("README.md", "provenance.json", "recipe.yaml"):
        (tmp_path / name).unlink()
    data = load_distilled(tmp_path)
    assert (data.content, data.recipe, data.teacher_weights, data.class_names) == (content, None, {}, tuple(names))


@pytest.mark.parametrize(("image_format", "channels"), [("png", 1), ("jpeg", 1), ("png", 3), ("webp", 3)])
def test_without_a_recipe_the_first_image_sets_the_number_of_channels(tmp_path, image_format, channels):
    *_, shown = small_set(tmp_path, channels=channels, image_format=image_format)
    (tmp_path / "recipe.yaml").unlink()
    assert torch.equal(load_distilled(tmp_path).images_uint8, shown)
    assert load_distilled(tmp_path, channels=4 - channels).images_uint8.shape[1] == 4 - channels


@pytest.mark.parametrize(
    "card",
    [
        "configs:\n- config_name: default\n  data_files: [{split: train, path: /etc/passwd}]\n",
        "dataset_info:\n- config_name: default\n  splits: [{name: train, num_examples: 5}]\n",
        "configs: [",
        "&a [*a]",
    ],
)
def test_the_card_does_not_affect_reading(shards, card):
    content = load_distilled(shards).content
    (shards / "README.md").write_text(f"---\n{card}\n---\n")
    assert load_distilled(shards).content == content


# -- large data is kept in a file -------------------------------------------------------------------------------------


def same_rows(ours, theirs):
    assert torch.equal(ours.image_index, theirs.image_index)
    for a, b in ((ours.view, theirs.view), (ours.partner, theirs.partner)):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in vars(b))


@pytest.fixture
def folder(tmp_path):
    """A dataset of ten images, three classes and three epochs, in several shards and many row groups."""
    recipe, names, *_ = small_set(tmp_path / "set", channels=3, classes=5, ipc=2, size=16)
    for path in (tmp_path / "set").glob("*/*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=4)
    add_card(tmp_path / "set", recipe, names)
    return tmp_path / "set"


@pytest.fixture
def no_room_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "_IN_MEMORY", 0)
    monkeypatch.setattr(reading, "_PICTURES_AT_ONCE", 3)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_data_in_a_file_equals_data_in_memory(folder, monkeypatch, no_room_in_memory):
    filed = load_distilled(folder)
    monkeypatch.setattr(reading, "_IN_MEMORY", 2**23)
    whole = load_distilled(folder)
    for name in ("images_uint8", "labels", "teacher_logits"):
        ours, theirs = getattr(filed, name), getattr(whole, name)
        assert (ours.dtype, ours.is_contiguous()) == (theirs.dtype, True)
        assert torch.equal(ours, theirs)
    picked = torch.tensor([7, 0, 7])
    assert torch.equal(filed.images_uint8[picked], whole.images_uint8[picked])


def test_the_file_has_no_name_and_is_in_the_cache(folder, no_room_in_memory):
    data = load_distilled(folder)
    maps = Path("/proc/self/maps")
    if maps.is_file():
        lines = maps.read_text().splitlines()
        held = [line for line in lines if str(no_room_in_memory) in line and line.endswith("(deleted)")]
        assert len(held) == 3, "images, labels and logits"
    assert not list(no_room_in_memory.iterdir()), "the tables are not cached either"
    assert data.images_uint8.sum() > 0


def test_a_full_disk_gives_a_one_line_error(folder, monkeypatch, no_room_in_memory):
    real = reading.tempfile.TemporaryFile

    def full(**options):
        file = real(**options)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(reading.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError) as error:
        load_distilled(folder)
    assert all(word in one_line(error) for word in ("No space left", str(no_room_in_memory), "HF_DATASETS_CACHE"))


def test_images_of_two_sizes_give_a_one_line_error(folder):
    (path,) = (folder / "data").iterdir()
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    cells[8]["bytes"] = encode(torch.zeros(3, 12, 16, dtype=torch.uint8), "png")
    pq.write_table(
        table.set_column(0, table.schema.field("image"), pa.array(cells, table.schema.field("image").type)), path
    )
    with pytest.raises(DataError) as error:
        load_distilled(folder)
    assert all(word in one_line(error) for word in ("(3, 16, 16)", "(3, 12, 16)", str(folder)))


def digest_of_whole_tables(folder):
    """Compute `content` as the first version did, with everything in memory."""
    images, views = (
        pa.concat_tables(pq.read_table(path) for path in sorted((folder / name).iterdir())) for name in ("data", "views")
    )
    encoded = [cell["bytes"] for cell in images["image"].to_pylist()]
    digest = hashlib.sha256()
    for blob in encoded:
        digest.update(hashlib.sha256(blob).digest())
    for table in (images.select(["label", "teacher_logits"]), views):
        for start in range(0, len(table), 4096):
            for column in table.slice(start, 4096).columns:
                values = column.combine_chunks()
                values = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16], sum(map(len, encoded))


def test_the_digest_is_unchanged(folder):
    data = load_distilled(folder)
    assert (data.content, data.image_bytes) == digest_of_whole_tables(folder)


@pytest.mark.parametrize(("files", "group"), [(1, 333), (3, 333), (5, 4096), (2, 10_000)])
def test_the_digest_of_several_reads_is_unchanged(tmp_path, files, group):
    small_set(tmp_path, classes=7, ipc=100, epochs=12, size=8)
    for name in ("data", "views"):
        reshard(tmp_path, name, files, group)
    data = load_distilled(tmp_path)
    assert data.num_epochs * len(data.labels) > 2 * 4096
    assert (data.content, data.image_bytes) == digest_of_whole_tables(tmp_path)


# -- ranges of views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [range(10), range(3, 7), range(9, 10)])
def test_a_range_of_views_equals_that_part_of_the_epoch(folder, rows):
    data = load_distilled(folder)
    for epoch in range(3):
        all_rows, all_logits = data.epoch(epoch)
        some, logits = data.views(epoch, rows)
        same_rows(some, all_rows[rows.start : rows.stop])
        assert torch.equal(logits, all_logits[rows.start : rows.stop])
        assert not np.shares_memory(logits.numpy(), all_logits.numpy())


@pytest.fixture
def read_groups(monkeypatch):
    """A list that records the row groups that pyarrow reads."""
    groups, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, number, **more: groups.append(number) or read(self, number, **more)
    )
    return groups


def test_only_row_groups_that_hold_the_views_are_read(folder, read_groups):
    data = load_distilled(folder)  # 30 views of 10 images in row groups of 4
    for rows, expected in (((1, range(3)), [2, 3]), ((2, range(9, 10)), [7]), ((0, range(10)), [0, 1, 2])):
        read_groups.clear()
        data.views(*rows)
        assert read_groups == expected


def test_consecutive_views_read_a_row_group_once(folder, read_groups):
    data = load_distilled(folder)
    read_groups.clear()
    for epoch in range(3):
        for start in range(10):
            data.views(epoch, range(start, start + 1))
    assert read_groups == list(range(8))
