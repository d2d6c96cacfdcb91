import dataclasses
import errno
import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pipeline import add_card, one_line, small_set

from prism_hf.dataset import reader as reading
from prism_hf.dataset.reader import load_distilled, open_table
from prism_hf.errors import DataError
from prism_hf.images.pixels import encode
from prism_hf.images.views import from_columns

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("channels", "image_format"),
    [(1, "png"), (3, "png"), (3, "webp"), (1, "jpeg"), (3, "jpeg")],
)
def test_we_read_what_we_wrote(tmp_path, channels, image_format):
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
    """Compressed bytes of each row group, as its metadata say."""
    for path in sorted((folder / table).iterdir()):
        metadata = pq.read_metadata(path).to_dict()
        for group in metadata["row_groups"]:
            chunks = [chunk for chunk in group["columns"] if chunk["path_in_schema"].startswith(column)]
            yield sum(chunk["total_compressed_size"] for chunk in chunks)


@pytest.mark.parametrize("shard_mb", [500, 1], ids=["one file", "some files"])
def test_bytes_of_labels_are_those_of_the_epochs_that_are_read(tmp_path, shard_mb):
    recipe, names, *_ = small_set(tmp_path, classes=300, ipc=2, epochs=4, size=8, shard_mb=shard_mb)
    add_card(tmp_path, recipe, names)
    assert len(list((tmp_path / "views").iterdir())) == (1 if shard_mb == 500 else 2)
    data, groups = load_distilled(tmp_path), list(sizes(tmp_path, "views"))
    assert len(groups) == 4
    assert [data.label_bytes_of(epochs) for epochs in range(5)] == [sum(groups[:epochs]) for epochs in range(5)]
    assert data.label_bytes_of() == sum(groups) < data.label_bytes
    logits = sum(sizes(tmp_path, "data", "teacher_logits"))
    assert 0 < data.image_label_bytes() == logits < 600 * 300 * 2 * 1.1


def test_a_row_group_of_several_epochs_is_read_whole(tmp_path):
    recipe, names, *_ = small_set(tmp_path, epochs=4)
    (path,) = (tmp_path / "views").iterdir()
    pq.write_table(pq.read_table(path), path, row_group_size=30)  # 12 images: epochs 0, 1 and half of 2, and the rest
    add_card(tmp_path, recipe, names)
    data, (first, second) = load_distilled(tmp_path), sizes(tmp_path, "views")
    assert [data.label_bytes_of(epochs) for epochs in range(5)] == [0, first, first, first + second, first + second]


def test_without_files_nothing_is_said_of_their_bytes(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    data = dataclasses.replace(load_distilled(tmp_path), footers=lambda _: None)
    assert data.label_bytes_of(1) is None
    assert data.image_label_bytes() is None


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
        header = "---\nconfigs:\n"
        for config in ("default", "views"):
            (folder / config).mkdir()
            datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(folder / config / "train-0.parquet")
            header += f"- {{config_name: {config}, data_files: [{{split: train, path: {config}/train-*}}]}}\n"
        (folder / "README.md").write_text(header + "---\n")
    return folder


@pytest.mark.parametrize("kind", ["missing", "hub id", "empty", "text", "parquet", "other columns"])
def test_a_foreign_folder_is_one_line(tmp_path, kind):
    source = foreign(tmp_path, kind)
    with pytest.raises(DataError) as error:
        load_distilled(source)
    assert str(source) in one_line(error)


def test_missing_views_are_one_line(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    add_card(tmp_path, recipe, names)
    next((tmp_path / "views").iterdir()).unlink()
    with pytest.raises(DataError) as error:
        load_distilled(tmp_path)
    assert "views" in one_line(error)


def test_half_an_epoch_is_one_line(tmp_path):
    recipe, names, *_ = small_set(tmp_path)
    path = tmp_path / "views" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    add_card(tmp_path, recipe, names)
    with pytest.raises(DataError) as error:
        load_distilled(tmp_path)
    assert "whole epochs" in one_line(error)


# -- what is large lies in a file -------------------------------------------------------------------------------------


def same_rows(ours, theirs):
    assert torch.equal(ours.image_index, theirs.image_index)
    for a, b in ((ours.view, theirs.view), (ours.partner, theirs.partner)):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in vars(b))


@pytest.fixture
def folder(tmp_path):
    """A set of ten images of three classes, three epochs, in several shards and many row groups."""
    recipe, names, *_ = small_set(tmp_path / "set", channels=3, classes=5, ipc=2, size=16)
    for path in (tmp_path / "set").glob("*/*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=4)
    add_card(tmp_path / "set", recipe, names)
    return tmp_path / "set"


@pytest.fixture
def no_room_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "_IN_MEMORY", 0)
    monkeypatch.setattr(reading, "_PICTURES_AT_ONCE", 3)
    monkeypatch.setattr(reading, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_file_holds_what_memory_would(folder, monkeypatch, no_room_in_memory):
    filed = load_distilled(folder)
    monkeypatch.setattr(reading, "_IN_MEMORY", 2**23)
    whole = load_distilled(folder)
    for name in ("images_uint8", "labels", "teacher_logits"):
        ours, theirs = getattr(filed, name), getattr(whole, name)
        assert (ours.dtype, ours.is_contiguous()) == (theirs.dtype, True)
        assert torch.equal(ours, theirs)
    picked = torch.tensor([7, 0, 7])
    assert torch.equal(filed.images_uint8[picked], whole.images_uint8[picked])


def test_the_file_has_no_name_and_lies_in_the_cache(folder, no_room_in_memory):
    data = load_distilled(folder)
    maps = Path("/proc/self/maps")
    if maps.is_file():
        lines = maps.read_text().splitlines()
        held = [line for line in lines if str(no_room_in_memory) in line and line.endswith("(deleted)")]
        assert len(held) == 3, "images, labels and logits"
    assert not [path for path in no_room_in_memory.iterdir() if path.is_file() and path.suffix != ".lock"]
    assert data.images_uint8.sum() > 0


def test_a_full_disk_is_one_line(folder, monkeypatch, no_room_in_memory):
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


def test_images_of_two_sizes_are_one_line(folder):
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
    """`content` as it was first written, with everything in memory."""
    images, views = open_table(folder, "default"), open_table(folder, "views")
    encoded = [cell["bytes"] for cell in images.cast_column("image", datasets.Image(decode=False))["image"]]
    digest = hashlib.sha256()
    for blob in encoded:
        digest.update(hashlib.sha256(blob).digest())
    for table in (images.select_columns(["label", "teacher_logits"]), views):
        for batch in table.with_format("arrow").iter(batch_size=4096):
            for column in batch.columns:
                values = column.combine_chunks()
                values = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16], sum(map(len, encoded))


def test_the_digest_is_what_it_always_was(folder):
    data = load_distilled(folder)
    assert (data.content, data.image_bytes) == digest_of_whole_tables(folder)


def test_the_digest_of_more_rows_than_are_read_at_once_is_what_it_always_was(tmp_path):
    recipe, names, *_ = small_set(tmp_path, classes=7, ipc=100, epochs=12, size=8)
    for path in tmp_path.glob("*/*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=333)
    add_card(tmp_path, recipe, names)
    data = load_distilled(tmp_path)
    assert data.num_epochs * len(data.labels) > 2 * 4096
    assert (data.content, data.image_bytes) == digest_of_whole_tables(tmp_path)


# -- ranges of views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [range(10), range(3, 7), range(9, 10)])
def test_a_range_of_views_is_that_part_of_the_epoch(folder, rows):
    data = load_distilled(folder)
    for epoch in range(3):
        all_rows, all_logits = data.epoch(epoch)
        some, logits = data.views(epoch, rows)
        same_rows(some, all_rows[rows.start : rows.stop])
        assert torch.equal(logits, all_logits[rows.start : rows.stop])
        assert not np.shares_memory(logits.numpy(), all_logits.numpy())


# -- on the Hub, offline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_offline_a_table_that_another_program_cached_will_do(monkeypatch, offline):
    asked = []

    def load(source, config, **options):
        asked.append(options)
        if "fragment_scan_options" in options:
            raise ValueError("Couldn't find cache")
        return "table"

    monkeypatch.setattr(reading.datasets, "load_dataset", load)
    monkeypatch.setattr(reading, "is_offline_mode", lambda: offline)
    if offline:
        assert open_table("org/set", "views") == "table"
    else:
        with pytest.raises(DataError, match="Couldn't find cache"):
            open_table("org/set", "views")
    assert len(asked) == 1 + offline
