import hashlib
import io
from contextlib import suppress

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, Features, Image, Value
from foreign_tables import FEATURES, NAMES, png, rows
from PIL import Image as Pillow
from pipeline import one_line, random_picture
from sklearn.datasets import load_digits

from prism_hf.errors import DataError, StoppedError
from prism_hf.images.source import load_source, load_test_split
from prism_hf.method.start_images import real_rows
from prism_hf.recipe.sections import DataRecipe
from prism_hf.runtime import stop as interruption


def recipe(source, **values):
    return DataRecipe(**{"source": str(source), "num_classes": 3, "size": 16, "channels": 3} | values)


def parquet(folder, **splits):
    (folder / "data").mkdir(parents=True)
    for name, part in splits.items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory):
    return parquet(tmp_path_factory.mktemp("parquet"), train=rows(8), test=rows(2, offset=100))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagefolder")
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                random_picture(17 + i, 23, seed=label * 10 + i).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "set"
    DatasetDict({"train": rows(4), "test": rows(2, offset=100)}).save_to_disk(folder)
    return folder


# -- digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_source(DataRecipe(source="digits", num_classes=10, size=8, channels=1))


def test_the_split_of_digits_is_pinned(digits):
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.class_names == tuple("0123456789")
    assert digits.revision is None
    digest = hashlib.sha256(digits.train.labels.tobytes() + digits.test.labels.tobytes())
    for part in (digits.train, digits.test):
        digest.update(part.images(range(len(part))).numpy().tobytes())
    assert digest.hexdigest() == "b46cf6aac3e5837294647a9aea4cb850e0b66f31c6a9057805c1deade1089864"


def test_digits_are_stratified_disjoint_and_complete(digits):
    source = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, 64)
    parts = [part.images(range(len(part))).numpy().reshape(-1, 64) for part in (digits.train, digits.test)]
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(map(bytes, source))
    for label in range(10):
        train, test = (int((part.labels == label).sum()) for part in (digits.train, digits.test))
        assert test / (train + test) == pytest.approx(0.25, abs=0.01)


def test_digits_have_the_splits_train_and_test(digits):
    values = {"source": "digits", "num_classes": 10, "size": 8, "channels": 1}
    again = load_test_split(DataRecipe(**values), "digits", "test", digits.class_names)
    assert torch.equal(again.images(range(450)), digits.test.images(range(450)))
    with pytest.raises(DataError) as error:
        load_source(DataRecipe(**values, train_split="nope"))
    assert "no split 'nope'; its splits are 'train', 'test'" in one_line(error)


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet_folder", "image_folder", "saved_folder"])
def test_local_folders_load(kind, request):
    data = load_source(recipe(request.getfixturevalue(kind)))
    assert data.class_names == tuple(NAMES)
    assert data.num_classes == 3
    assert data.revision is None
    assert data.train.images([0, 1]).shape == (2, 3, 16, 16)
    assert data.train.images([0]).dtype == torch.uint8
    assert len(data.test) == 6
    assert [len(r) for r in data.test.rows_by_class(3)] == [2, 2, 2]


def test_parquet_config_is_used(tmp_path):
    parquet(tmp_path / "x", train=rows(2), test=rows(1))
    (tmp_path / "x" / "data").rename(tmp_path / "small")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: train, path: small/train-*}\n"
        "  - {split: test, path: small/test-*}\n---\n"
    )
    assert len(load_source(recipe(tmp_path, config="small")).train) == 6
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path, config="large"))
    assert "large" in one_line(error)


def test_columns_are_found_by_type_or_named(tmp_path):
    features = Features({"fine": ClassLabel(names=NAMES), "picture": Image(), "coarse": Value("int64")})
    columns = {"picture": [png(i) for i in range(6)], "fine": [0, 1, 2] * 2, "coarse": [2, 1, 0] * 2}
    part = rows(2, features=features, **columns)
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path)
    assert load_source(recipe(tmp_path)).train.labels.tolist() == [0, 1, 2] * 2
    named = load_source(recipe(tmp_path, image_column="picture", label_column="coarse"))
    assert named.train.labels.tolist() == [2, 1, 0] * 2
    assert named.class_names == ("0", "1", "2")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_any_mode_and_size_is_converted_to_the_working_image(tmp_path, mode, channels):
    pictures = []
    for i, (width, height) in enumerate([(16, 16), (5, 40), (200, 31), (1, 1), (16, 17), (17, 16)]):
        buffer = io.BytesIO()
        picture = random_picture(width, height, seed=i).convert(mode)
        picture.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    part = rows(2, image=pictures)
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path)
    images = load_source(recipe(tmp_path, channels=channels)).train.images(range(6))
    assert images.shape == (6, channels, 16, 16)
    same = Pillow.open(io.BytesIO(pictures[0]["bytes"])).convert("L" if channels == 1 else "RGB")
    literal = torch.from_numpy(np.array(same)).view(16, 16, -1).permute(2, 0, 1)
    assert torch.equal(images[0], literal)


def test_background_and_white_level_of_the_recipe_reach_the_images(tmp_path):
    cells = [
        Pillow.new("RGBA", (16, 16), (9, 9, 9, 0)),
        Pillow.fromarray(np.full((16, 16), 2048, np.uint16)),
        *[png(0)] * 4,
    ]
    DatasetDict({"train": rows(2, image=cells), "test": rows(2)}).save_to_disk(tmp_path)
    data = load_source(recipe(tmp_path, background="#102030", white_level=4096))
    assert [image.view(3, -1).unique(dim=1).tolist() for image in data.train.images([0, 1])] == [
        [[16], [32], [48]],
        [[128]] * 3,
    ]
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path)).train.images([1])
    assert one_line(error).startswith("row 1 of split 'train' is a 16-bit image")


# -- errors -----------------------------------------------------------------------------------------------------------

int_features = Features({"image": Image(), "label": Value("int32")})


def more(**features):
    return Features({**FEATURES, **features})


@pytest.mark.parametrize(
    ("features", "columns", "values", "words"),
    [
        (Features({"label": ClassLabel(names=NAMES)}), {}, {}, ["no column of type Image", "data.image_column"]),
        (Features({"image": Image(), "label": Value("float64")}), {"label": [0.0] * 6}, {},
         ["no column of type ClassLabel", "data.label_column"]),
        (more(other=Image()), {"other": [png(i) for i in range(6)]}, {},
         ["more than one", "image (Image)", "other (Image)"]),
        (more(other=ClassLabel(names=NAMES)), {"other": [0] * 6}, {}, ["more than one", "label_column"]),
        (FEATURES, {}, {"num_classes": 4}, ["num_classes is 4", "3 classes"]),
        (FEATURES, {}, {"image_column": "nope"}, ["'nope'", "image (Image)"]),
        (FEATURES, {}, {"label_column": "nope"}, ["'nope'", "label (ClassLabel)"]),
        (FEATURES, {}, {"image_column": "label"}, ["expected Image", "bytes"]),
        (more(text=Value("string")), {"text": list("abcdab")}, {"label_column": "text"},
         ["num_classes is 3", "4 classes: 'a', 'b', 'c', 'd'"]),
        (FEATURES, {}, {"train_split": "nope"}, ["'nope'"]),
        (FEATURES, {}, {"test_split": "nope"}, ["'nope'"]),
        (FEATURES, {"label": [0, 1, 2, -1, 1, 2]}, {}, ["row 3", "'train'", "label -1"]),
        (int_features, {"label": [0, 1, 2, 0, 3, 2]}, {"label_column": "label"}, ["row 4", "label 3", "0 to 2"]),
    ],
    ids=[
        "no image", "no label", "two images", "two labels", "class count", "image name", "label name", "label as image",
        "string labels", "train split", "test split", "label -1", "label too large",
    ],
)  # fmt: skip
def test_wrong_columns_give_a_one_line_error(tmp_path, features, columns, values, words):
    part = rows(2, features=features, **columns)
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path, **values))
    text = one_line(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("test_features", "words"),
    [
        (Features({"image": Image(), "label": ClassLabel(names=NAMES[::-1])}), ["different order", "'test'"]),
        (Features({"image": Image()}), ["no column 'label'", "'test'"]),
        (Features({"label": ClassLabel(names=NAMES)}), ["no column 'image'", "'test'"]),
    ],
    ids=["order", "no label", "no image"],
)
def test_splits_that_differ_give_a_one_line_error(tmp_path, test_features, words):
    DatasetDict({"train": rows(2), "test": rows(2, features=test_features)}).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    text = one_line(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("split", ["nope", "train[:0]"])
def test_an_unknown_or_empty_parquet_split_gives_a_one_line_error(parquet_folder, split):
    with pytest.raises(DataError) as error:
        real_rows(load_source(recipe(parquet_folder, train_split=split)), 1, seed=0)
    one_line(error)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("/no/such/folder", "/no/such/folder"),
        ("./no-such-folder", "no-such-folder"),
        ("digit", "`digits`"),
        ("nobody-there/no-such-set", "nobody-there/no-such-set"),
    ],
)
def test_missing_sources_give_a_one_line_error(source, word):
    with pytest.raises(DataError) as error:
        load_source(recipe(source))
    assert word in one_line(error)


def test_an_empty_folder_and_a_saved_single_dataset_give_one_line_errors(tmp_path):
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    one_line(error)
    rows(2).save_to_disk(tmp_path / "single")
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path / "single"))
    assert "DatasetDict" in one_line(error)


@pytest.mark.parametrize("broken", ["text", "cut", "empty", "none"])
def test_the_error_for_a_corrupt_image_names_its_row(tmp_path, broken):
    cells = [png(i) for i in range(6)]
    whole = cells[4]["bytes"]
    cells[4] = {
        "text": {"bytes": b"not a picture", "path": None},
        "cut": {"bytes": whole[: len(whole) // 2], "path": None},
        "empty": {"bytes": b"", "path": None},
        "none": None,
    }[broken]
    part = rows(2, image=cells)
    DatasetDict({"train": part, "test": rows(2)}).save_to_disk(tmp_path)
    data = load_source(recipe(tmp_path))
    with pytest.raises(DataError) as error:
        data.train.images([0, 4])
    assert "row 4" in one_line(error)
    assert "'train'" in one_line(error)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_any_damage_gives_a_data_error_or_a_picture(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("prism_hf.images.source._CACHE_BYTES", 0)
    buffer = io.BytesIO()
    random_picture(20, 18).save(buffer, kind)
    whole, rng, cells = buffer.getvalue(), np.random.default_rng(0), []
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(256)
        cells.append({"bytes": bytes(data), "path": None})
    DatasetDict({"train": rows(20, image=cells), "test": rows(2)}).save_to_disk(tmp_path)
    split = load_source(recipe(tmp_path)).train
    for row in range(60):
        with suppress(DataError):
            split.images([row])


# -- validation_fraction ----------------------------------------------------------------------------------------------


def test_validation_images_come_only_from_the_training_split(parquet_folder):
    def pictures(split):
        return sorted(image.numpy().tobytes() for image in split.images(range(len(split))))

    whole = load_source(recipe(parquet_folder))
    tuning = load_source(recipe(parquet_folder, validation_fraction=0.25))
    assert (len(tuning.train), len(tuning.test)) == (18, 6)
    assert [len(r) for r in tuning.test.rows_by_class(3)] == [2, 2, 2]
    assert sorted(pictures(tuning.train) + pictures(tuning.test)) == pictures(whole.train)
    assert not set(pictures(tuning.test)) & set(pictures(tuning.train))
    assert not set(pictures(tuning.test)) & set(pictures(whole.test))
    again = load_source(recipe(parquet_folder, validation_fraction=0.25))
    assert pictures(again.test) == pictures(tuning.test)


def test_validation_works_without_a_test_split(tmp_path):
    data = load_source(recipe(parquet(tmp_path, train=rows(8)), validation_fraction=0.25))
    assert (len(data.train), len(data.test)) == (18, 6)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_validation_part_that_is_too_small_gives_a_one_line_error(parquet_folder, fraction):
    with pytest.raises(DataError) as error:
        load_source(recipe(parquet_folder, validation_fraction=fraction))
    assert "validation_fraction" in one_line(error)


def test_a_class_of_one_image_cannot_be_held_out(tmp_path):
    DatasetDict({"train": rows(3, label=[0, 1, 1, 0, 0, 1, 1, 2, 0])}).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path, validation_fraction=0.5))
    assert "only one image of 'cat'; add images or remove the class" in one_line(error)


# -- reading images ---------------------------------------------------------------------------------------------------


def test_reading_images_stops_on_request(digits):
    interruption._wanted.set()
    try:
        with pytest.raises(StoppedError):
            digits.train.images([0])
    finally:
        interruption._wanted.clear()
    assert digits.train.images([0]).shape == (1, 1, 8, 8)


def test_large_splits_are_decoded_on_demand_with_equal_results(parquet_folder, monkeypatch):
    whole = load_source(recipe(parquet_folder)).train.images([3, 1, 3])
    monkeypatch.setattr("prism_hf.images.source._CACHE_BYTES", 0)
    assert torch.equal(whole, load_source(recipe(parquet_folder)).train.images([3, 1, 3]))


# -- another test set -------------------------------------------------------------------------------------------------


def test_another_test_set_of_the_same_classes(image_folder, parquet_folder):
    split = load_test_split(recipe(parquet_folder), str(image_folder), "train", NAMES)
    assert (len(split), split.name) == (12, "train")
    assert split.images([0]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("source", "split", "names", "words"),
    [
        ("/no/such/folder", "test", NAMES, ["/no/such/folder"]),
        (None, "nope", NAMES, ["'nope'"]),
        (None, "test", [*NAMES, "dog"], ["class 'dog'", "3 classes of the test data"]),
    ],
)
def test_another_test_set_that_does_not_fit_gives_a_one_line_error(parquet_folder, source, split, names, words):
    with pytest.raises(DataError) as error:
        load_test_split(recipe(parquet_folder), source or str(parquet_folder), split, names)
    text = one_line(error)
    assert all(word in text for word in words), text


def test_another_test_set_may_list_its_classes_in_another_order(parquet_folder):
    same, other = (
        load_test_split(recipe(parquet_folder), str(parquet_folder), "test", names) for names in (NAMES, NAMES[::-1])
    )
    assert other.labels.tolist() == [len(NAMES) - 1 - label for label in same.labels.tolist()]
    assert torch.equal(other.images(range(len(other))), same.images(range(len(same))))


def test_another_test_set_has_labels_in_range(tmp_path):
    part = rows(2, features=int_features, label=[0, 1, 2, 0, 3, 2])
    DatasetDict({"test": part}).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        load_test_split(recipe(tmp_path, label_column="label"), str(tmp_path), "test", NAMES)
    assert "label 3" in one_line(error)


def test_datasets_library_is_offline():
    assert datasets.config.HF_HUB_OFFLINE
