"""Columns as other programs write them: labels of any integer type, strings, encoded images, arrays of pixels."""

import io

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from each import each
from foreign_tables import NAMES, png, rows
from PIL import Image
from pipeline import one_line

from prism_hf.errors import DataError
from prism_hf.images import count_classes, load_source
from prism_hf.recipe import DataRecipe

COUNT = 6
LABELS = [0, 1, 2] * 2


def recipe(folder, **values):
    return DataRecipe(**{"source": str(folder), "num_classes": 3, "size": 16} | values)


def tables(folder, train, test=None):
    """Write two Parquet files without the metadata of `datasets`."""
    for name, part in (("train", train), ("test", test or train)):
        pq.write_table(pa.table(part), folder / f"{name}-00000-of-00001.parquet")
    return folder


def pixels(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))


PICTURES = [png(i, size=(16, 16)) for i in range(COUNT)]
BLOBS = [cell["bytes"] for cell in PICTURES]
ARRAYS = [pixels(cell) for cell in PICTURES]


@each("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_labels_may_be_integers_of_any_type(tmp_path, dtype):
    part = rows(2, features=Features({"image": datasets.Image(), "label": Value(dtype)}), label=LABELS)
    part.to_parquet(tmp_path / "train.parquet")
    part.to_parquet(tmp_path / "test.parquet")
    data = load_source(recipe(tmp_path))
    assert data.train.labels.tolist() == LABELS
    assert data.train.labels.dtype == np.int64


@each("dtype, label", [("uint64", 2**64 - 1), ("uint8", 255), ("int64", -1), ("int8", -128), ("uint16", 3)])
def test_labels_out_of_range_are_named(tmp_path, dtype, label):
    tables(tmp_path, {"image": BLOBS, "label": pa.array([*LABELS[:-1], label], pa.type_for_alias(dtype))})
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    assert f"row 5 of split 'train' has label {label}, expected 0 to 2" in one_line(error)


@each("kind", ["string", "large_string"])
def test_labels_may_be_strings(tmp_path, kind):
    names = pa.array(["owl", "ant", "Bee"] * 2, pa.type_for_alias(kind))
    tables(tmp_path, {"image": BLOBS, "label": names}, {"image": BLOBS[:2], "label": names[1:3]})
    data = load_source(recipe(tmp_path))
    assert data.class_names == ("Bee", "ant", "owl")
    assert data.train.labels.tolist() == [2, 1, 0] * 2
    assert data.test.labels.tolist() == [1, 0]
    assert count_classes(recipe(tmp_path)) == 3
    held = load_source(recipe(tmp_path, validation_fraction=0.5))
    assert sorted(held.test.labels.tolist()) == [0, 1, 2]


def test_a_string_label_that_training_lacks_is_named(tmp_path):
    tables(tmp_path, {"image": BLOBS, "label": list("abcabc")}, {"image": BLOBS[:2], "label": ["a", "x"]})
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    assert "row 1 of split 'test' has label 'x', expected one of the classes" in one_line(error)


def test_booleans_are_two_classes(tmp_path):
    tables(tmp_path, {"image": BLOBS, "label": [True, False] * 3})
    data = load_source(recipe(tmp_path, num_classes=2))
    assert data.class_names == ("False", "True")
    assert data.train.labels.tolist() == [1, 0] * 3


@each("label", [
    pa.array([0, 1, None, 0, 1, 2]), pa.array(["a", "b", None, "a", "b", "c"]), pa.array([0, 1, None, 0, 1, 2], pa.uint8()),
])  # fmt: skip
def test_a_missing_label_is_called_null(tmp_path, label):
    tables(tmp_path, {"image": BLOBS, "label": label})
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path))
    assert "row 2 of split 'train' has no label (null)" in one_line(error)


@each("image", [
    pa.array([BLOBS[0], None, *BLOBS[2:]]), pa.array([BLOBS[0], b"", *BLOBS[2:]]),
    pa.array([PICTURES[0], None, *PICTURES[2:]]), pa.array([PICTURES[0], {"bytes": None, "path": None}, *PICTURES[2:]]),
])  # fmt: skip
def test_a_missing_image_is_named(tmp_path, image):
    data = load_source(recipe(tables(tmp_path, {"image": image, "label": LABELS})))
    with pytest.raises(DataError) as error:
        data.train.images([1])
    assert "row 1 of split 'train'" in one_line(error)
    if image[1].as_py() != b"":
        assert "has no image (null)" in one_line(error)


STRUCT = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})


@each("image", [
    pa.array(BLOBS), pa.array(BLOBS, pa.large_binary()), pa.array(PICTURES), pa.array(PICTURES, STRUCT),
    pa.array([{"bytes": blob} for blob in BLOBS]), pa.array([{"path": "x.png", "bytes": blob} for blob in BLOBS]),
])  # fmt: skip
@pytest.mark.parametrize("named", [True, False])
def test_images_may_be_bytes_or_structs_without_metadata(tmp_path, image, named):
    values = {"image_column": "picture", "label_column": "kind"} if named else {}
    data = load_source(recipe(tables(tmp_path, {"picture": image, "kind": LABELS}), **values))
    assert data.train.columns == ("picture", "kind")
    assert np.array_equal(data.train.images(range(COUNT)).permute(0, 2, 3, 1).numpy(), ARRAYS)
    assert data.train.file_sizes.tolist() == list(map(len, BLOBS))
    assert data.train.file(3) == BLOBS[3]


def test_pandas_writes_images_that_can_be_read(tmp_path):
    for name in ("train", "test"):
        pd.DataFrame({"image": BLOBS, "label": NAMES * 2}).to_parquet(tmp_path / f"{name}.parquet")
    data = load_source(recipe(tmp_path))
    assert data.class_names == tuple(NAMES)
    assert np.array_equal(data.train.images([5])[0].permute(1, 2, 0).numpy(), ARRAYS[5])


@each("feature, arrays", [
    (datasets.Array3D((16, 16, 3), "uint8"), ARRAYS),
    (datasets.Array3D((3, 16, 16), "uint8"), [array.transpose(2, 0, 1) for array in ARRAYS]),
    (datasets.Array3D((16, 16, 3), "int32"), ARRAYS),
    (datasets.List(datasets.List(datasets.List(Value("int64")))), [array.tolist() for array in ARRAYS]),
])  # fmt: skip
def test_images_may_be_arrays_of_pixels(tmp_path, feature, arrays):
    features = Features({"image": feature, "label": ClassLabel(names=NAMES)})
    for name in ("train", "test"):
        Dataset.from_dict({"image": arrays, "label": LABELS}, features=features).to_parquet(tmp_path / f"{name}.parquet")
    data = load_source(recipe(tmp_path, image_column="image"))
    assert np.array_equal(data.train.images(range(COUNT)).permute(0, 2, 3, 1).numpy(), ARRAYS)


def test_gray_arrays_are_gray_images(tmp_path):
    gray = [array[..., 0] for array in ARRAYS]
    features = Features({"image": datasets.Array2D((16, 16), "uint8"), "label": ClassLabel(names=NAMES)})
    for name in ("train", "test"):
        Dataset.from_dict({"image": gray, "label": LABELS}, features=features).to_parquet(tmp_path / f"{name}.parquet")
    data = load_source(recipe(tmp_path, channels=1))
    assert np.array_equal(data.train.images(range(COUNT))[:, 0].numpy(), gray)


@each("values, words", [
    ({"image": pa.array([[0.5] * 4] * COUNT)}, ["of type List", "integers from 0 to 255", "(H, W, C)"]),
    ({"image": ["a.png"] * COUNT}, ["of type string", 'cast_column("image", datasets.Image())']),
    ({"image": pa.array([[[[300, 0, 0]]]] * COUNT)}, ["row 0 of split 'train'", "(1, 1, 3)", "0 to 255"]),
    ({"image": BLOBS, "label": pa.array([[0, 1]] * COUNT)}, ["of type List", "one class per image"]),
    ({"image": BLOBS, "label": pa.array([0.0, 1.0, 2.0] * 2)}, ["of type float64", "one class per image", "pandas"]),
])  # fmt: skip
def test_columns_that_cannot_be_read_give_the_whole_fix(tmp_path, values, words):
    tables(tmp_path, {"label": LABELS} | values)
    with pytest.raises(DataError) as error:
        load_source(recipe(tmp_path, image_column="image", label_column="label")).train.images([0])
    assert all(word in one_line(error) for word in words), one_line(error)
