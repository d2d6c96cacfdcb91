"""Faults of real data: the same images in training and test, blank images, files that are left out."""

import pytest
from datasets import DatasetDict
from foreign_tables import png, rows
from PIL import Image
from pipeline import one_line, random_picture

from prism_hf.errors import DataError
from prism_hf.images import describe_source, faults_of, load_source
from prism_hf.images.audit import MOST_SHARED
from prism_hf.recipe import DataRecipe


def load(folder, train, test, **values):
    DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    recipe = DataRecipe(source=str(folder), num_classes=3, size=16, **values)
    return load_source(recipe), recipe


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_few_test_images_in_training_are_named(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("prism_hf.images.source._CACHE_BYTES", 0)
    test = [png(100 + i) for i in range(30)]
    test[7], test[8] = png(4), png(0)
    data, recipe = load(tmp_path, rows(4), rows(10, image=test))
    (warning,) = faults_of(data, recipe)
    assert "test images that are also training images: 2 of 30" in warning
    assert "row 7 of split 'test' is row 4 of split 'train'; row 8 of split 'test' is row 0 of split 'train'" in warning


@pytest.mark.parametrize("in_memory", [True, False])
def test_many_test_images_in_training_are_refused(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("prism_hf.images.source._CACHE_BYTES", 0)
    test = [png(i) for i in range(4)] + [png(100 + i) for i in range(26)]
    data, recipe = load(tmp_path, rows(4), rows(10, image=test))
    with pytest.raises(DataError) as error:
        faults_of(data, recipe)
    assert "also training images: 4 of 30" in one_line(error)
    assert f"at most {MOST_SHARED:.0%}" in one_line(error)


def test_copies_are_found_by_their_pixels(tmp_path):
    """The same picture as PNG and as lossless WebP has different bytes."""
    import io

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(0)["bytes"])).save(buffer, "WEBP", lossless=True)
    test = [{"bytes": buffer.getvalue(), "path": None}, png(101), png(102)] + [png(103 + i) for i in range(9)]
    data, recipe = load(tmp_path, rows(4), rows(4, image=test))
    assert "training images: 1 of 12" in faults_of(data, recipe)[0]


def test_held_out_images_are_compared_too(tmp_path):
    part = rows(8, image=[png(i // 2) for i in range(24)])  # each image twice
    data, recipe = load(tmp_path, part, part, validation_fraction=0.25)
    with pytest.raises(DataError) as error:
        faults_of(data, recipe)
    assert "also training images: " in one_line(error)


def test_blank_images_are_counted_and_not_compared(tmp_path):
    blank = Image.new("RGB", (20, 18), (255, 255, 255))
    cells = [blank, blank, *(random_picture(20, 18, seed=i) for i in range(10))]
    data, recipe = load(tmp_path, rows(4, image=cells), rows(4, image=[*cells[:1], *(png(50 + i) for i in range(11))]))
    train, test = faults_of(data, recipe)
    assert train.startswith("images of a single color: 2 of 12, such as row 0 of split 'train'")
    assert test.startswith("images of a single color: 1 of 12, such as row 0 of split 'test'")
    assert "data.background" in train


def test_one_image_with_two_classes_is_named(tmp_path):
    data, recipe = load(tmp_path, rows(4, image=[png(0), png(0), *(png(i) for i in range(1, 11))]), rows(4, offset=50))
    (warning,) = faults_of(data, recipe)
    assert warning == (
        "training images with more than one class: 1, such as row 0 of split 'train' and row 1 of split 'train'"
    )


def test_a_table_that_is_in_no_split_is_named(tmp_path):
    for number, name in enumerate(("train_7", "test", "7")):
        rows(2, offset=10 * number).to_parquet(tmp_path / f"{name}.parquet")
    recipe = DataRecipe(source=str(tmp_path), num_classes=3, size=16)
    data = load_source(recipe)
    assert faults_of(data, recipe) == ["files in no split, which are not used: 1, such as '7.parquet'"]
    assert "3 files found, 1 in 'train', 1 in 'test'" in describe_source(data, recipe)


def test_sound_data_gives_no_warning(tmp_path):
    data, recipe = load(tmp_path, rows(4), rows(4, offset=50))
    assert faults_of(data, recipe) == []
    text = "12 training and 12 test images of 3 classes, columns 'image' and 'label'"
    assert describe_source(data, recipe) == f"data {recipe.source!r}: {text}"


def test_a_class_without_images_is_named(tmp_path):
    """Top-1 accuracy says nothing about a class that has no test images."""
    data, recipe = load(tmp_path, rows(4), rows(4, offset=50, label=[0, 2] * 6))
    assert faults_of(data, recipe) == ["classes without images in split 'test': 1, such as 'bee'"]
