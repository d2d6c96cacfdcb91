import datasets
import pyarrow.parquet as pq
import pytest
import torch
from pipeline import add_card, one_line, small_set

from prism_hf.errors import DataError
from prism_hf.reading import load_distilled
from prism_hf.views import from_columns

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
        expected = from_columns(columns)
        assert torch.equal(rows.image_index, expected.image_index)
        for ours, theirs in ((rows.view, expected.view), (rows.partner, expected.partner)):
            assert all(torch.equal(getattr(ours, key), getattr(theirs, key)) for key in vars(theirs))
    assert data.image_bytes == sum(map(len, table.encoded))
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    assert data.label_bytes == files - data.image_bytes


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
