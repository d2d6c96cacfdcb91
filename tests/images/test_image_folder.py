"""Folders of image files: which file is in which class and split."""

import unicodedata

import pytest
from each import each
from pipeline import one_line, random_picture

from prism_hf.errors import DataError
from prism_hf.images import describe_source, faults_of, load_source
from prism_hf.images.image_folder import read_layout
from prism_hf.recipe import DataRecipe


def fill(folder, *files):
    """Write a different image for each name; return the names by the bytes of the working image."""
    for seed, file in enumerate(files):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        random_picture(16, 16, seed=seed).save(path)
    return folder


def recipe(folder, num_classes=2, **values):
    return DataRecipe(source=str(folder), num_classes=num_classes, size=16, **values)


def table(split):
    """Return (class number, file) of every image."""
    return [(int(label), split.where(row).split("(")[1][:-1]) for row, label in enumerate(split.labels)]


def files_of(split, folder):
    return sorted(file.removeprefix(f"{folder}/") for _, file in table(split))


WORDS = ["train", "bullet train", "test tube", "test", "validation", "dev", "a", "eval set"]


def test_a_class_or_file_may_have_the_name_of_a_split(tmp_path):
    files = [f"{split}/{name}/{file}" for split in ("train", "test") for name in WORDS for file in ("1.png", "train_2.png")]
    data = load_source(recipe(fill(tmp_path, *files), len(WORDS)))
    assert data.class_names == tuple(sorted(WORDS))
    for split, rows in (("train", data.train), ("test", data.test)):
        expected = [f"{split}/{name}/{file}" for name in WORDS for file in ("1.png", "train_2.png")]
        assert files_of(rows, tmp_path) == sorted(expected)
        assert all(data.class_names[label] == file.split("/")[-2] for label, file in table(rows))
    assert faults_of(data, recipe(tmp_path, len(WORDS))) == []
    assert "32 files found, 16 in 'test', 16 in 'train'" in describe_source(data, recipe(tmp_path, len(WORDS)))


@each("files", [
    ["a/1.png", "a/train_2.png", "b/test_1.png", "b/val.png"],
    ["train/1.png", "train/2.png", "b/1.png", "b/2.png"],
    ["photos/a/1.png", "photos/a/2.png", "photos/b/1.png", "photos/b/2.png"],
    ["pets/a/1.png", "pets/a/2.png", "wild/b/1.png", "wild/b/2.png"],
])  # fmt: skip
def test_a_folder_without_splits_is_all_training_images(tmp_path, files):
    values = {"train_split": "train", "test_split": "train"}
    data = load_source(recipe(fill(tmp_path, *files), **values))
    assert files_of(data.train, tmp_path) == sorted(files)
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    assert "no split 'test'" in one_line(error)
    assert "data.validation_fraction" in one_line(error)


@each("train, test, wanted", [
    ("Training", "Testing", "test"), ("TRAIN", "Val", "validation"), ("train", "dev", "val"),
    ("seg_train", "seg_test", "test"), ("train2017", "val2017", "validation"),
    ("my train", "final", "final"), ("train", "unseen", "unseen"),
])  # fmt: skip
def test_split_folders_may_have_other_names(tmp_path, train, test, wanted):
    fill(tmp_path, *(f"{split}/{name}/1.png" for split in (train, test) for name in "ab"))
    if wanted in ("final", "unseen"):  # not a word for a split
        with pytest.raises(DataError):
            load_source(recipe(tmp_path, test_split=wanted))
        return
    data = load_source(recipe(tmp_path, test_split=wanted))
    assert files_of(data.train, tmp_path) == [f"{train}/a/1.png", f"{train}/b/1.png"]
    assert files_of(data.test, tmp_path) == [f"{test}/a/1.png", f"{test}/b/1.png"]


def test_a_part_of_a_split_can_be_named(tmp_path):
    fill(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(4)))
    data = load_source(recipe(tmp_path, train_split="train[:75%]", test_split="train[75%:]"))
    assert files_of(data.train, tmp_path) == [
        f"train/{name}/{i}.png" for name, i in zip("aaaabb", [0, 1, 2, 3, 0, 1], strict=True)
    ]
    assert files_of(data.test, tmp_path) == ["train/b/2.png", "train/b/3.png"]


@each("files, words", [
    (["train/1.png", "test/2.png"], ["no class folders below train/", "'train/1.png'", "CLASS/IMAGE"]),
    (["train/a/1.png", "train/b/1.png", "train/stray.png", "test/a/1.png"], ["no class folders", "stray.png"]),
    (["1.png", "2.png"], ["'1.png' is not in a class folder"]),
    (["a/1.png", "b/x/2.png"], ["'a/1.png' and 'b/x/2.png'", "not equally deep"]),
    (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"], ["two folders called 't"]),
    (["train/a/images/1.png", "train/b/images/2.png", "val/a/images/3.png"], ["two folders called 'images'"]),
    (["train/caf\u00e9/1.png", "train/cafe\u0301/2.png", "train/b/1.png"], ["caf\\xe9", "cafe\\u0301"]),
])  # fmt: skip
def test_a_layout_that_is_not_clear_gives_a_one_line_error(files, words):
    with pytest.raises(DataError) as error:
        read_layout(files)
    assert all(word in one_line(error) for word in words), one_line(error)


def test_the_same_class_name_in_two_unicode_forms_is_one_class(tmp_path):
    name = "caf\u00e9"
    train, test = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    fill(tmp_path, f"train/{train}/1.png", "train/b/1.png", f"test/{test}/1.png", "test/b/1.png")
    data = load_source(recipe(tmp_path))
    assert data.class_names == ("b", name)
    assert data.test.labels.tolist() == [0, 1]


def test_classes_of_another_number_are_named(tmp_path):
    fill(tmp_path, "train/Cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png")
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    assert "3 classes: 'Cat', 'cat', 'dog'" in one_line(error)


def test_a_test_split_may_lack_a_class(tmp_path):
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/c/1.png")
    data = load_source(recipe(tmp_path, 3))
    assert data.class_names == ("a", "b", "c")
    assert data.test.labels.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["photos [v2]", "a*b", "what?", "x::y", "{1}", "100%", "a#b", "it's", "\u00e9 \u732b"])
def test_a_path_may_have_any_characters(tmp_path, name):
    fill(tmp_path / name, *(f"{split}/{label}/1 [x].png" for split in ("train", "test") for label in ("a", "b [v2]")))
    data = load_source(recipe(tmp_path / name))
    assert data.class_names == ("a", "b [v2]")
    assert data.train.images([0, 1]).shape == (2, 3, 16, 16)


def test_files_in_no_split_are_named(tmp_path):
    fill(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test", "more") for name in "ab"))
    (tmp_path / "train" / "a" / "2.heic").write_bytes(b"not read")
    (tmp_path / "notes.txt").write_text("no image")
    data = load_source(recipe(tmp_path))
    assert len(data.train) == 2
    (warning,) = faults_of(data, recipe(tmp_path))
    assert warning == "files in no split, which are not used: 3, such as 'more/a/1.png'"
    assert "7 files found, 2 in 'test', 2 in 'train'" in describe_source(data, recipe(tmp_path))
