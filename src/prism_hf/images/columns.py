"""The columns of a table: which one has the images and which one the labels, and how their values are read."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..errors import DataError
from ..recipe import DataRecipe
from ..runtime import is_inside


def find_image_column(rows: datasets.Dataset, recipe: DataRecipe) -> str:
    """Return the image column: the one that the recipe names, or the only one of type Image, or else of encoded images.

    Encoded images are bytes, or structs with bytes, as pandas and polars write them, or arrays of pixels.

    Raises:
        DataError: There is no such column, there are several, or the named one cannot have images.
    """
    named = recipe.image_column
    if named is None:
        typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        encoded = [name for name, feature in rows.features.items() if _is_encoded(feature)]
        return _only(typed or encoded, "Image", "image_column", rows)
    feature = _named(named, "image_column", rows)
    if not isinstance(feature, datasets.Image) and not _is_encoded(feature) and _dimensions(feature) not in (2, 3):
        raise DataError(
            f"data.image_column is {named!r}, of type {_type_name(feature)}, expected Image, bytes of image files, or "
            f"arrays of integers from 0 to 255, (H, W) or (H, W, C); the columns are {_listed(rows)}; paths become images "
            f'with `dataset.cast_column("{named}", datasets.Image())`'
        )
    return named


def find_label_column(rows: datasets.Dataset, recipe: DataRecipe, image_column: str) -> str:
    """Return the label column: the one that the recipe names, or the only ClassLabel, or else integers or strings.

    Raises:
        DataError: There is no such column, there are several, or the named one does not have one class per image.
    """
    named = recipe.label_column
    if named is None:
        others = {name: feature for name, feature in rows.features.items() if name != image_column}
        typed = [name for name, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
        return _only(typed or [name for name in others if _is_label(others[name])], "ClassLabel", "label_column", rows)
    feature = _named(named, "label_column", rows)
    if not isinstance(feature, datasets.ClassLabel) and not _is_label(feature):
        raise DataError(
            f"data.label_column is {named!r}, of type {_type_name(feature)}, expected one class per image: ClassLabel, "
            "integers, strings or booleans (pandas turns integers with missing values into floats)"
        )
    return named


def class_names(rows: datasets.Dataset, column: str, num_classes: int | None = None) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their numbers: of a ClassLabel, the sorted strings, or 0, 1, 2, ...

    Raises:
        DataError: The number of classes is not the expected one, or `None` is expected and the labels are numbers.
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif feature.dtype == "bool":
        names = ("False", "True")
    elif "string" in feature.dtype:
        names = tuple(sorted(pc.unique(_values(rows, column).cast(pa.string())).drop_null().to_pylist()))
    elif num_classes is None:
        raise DataError(
            f"label column {column!r} is of type {feature.dtype}, which does not define the class count; make it a "
            "ClassLabel (`Dataset.class_encode_column`)"
        )
    else:
        names = tuple(str(label) for label in range(num_classes))
    if num_classes not in (None, len(names)):
        listed = ", ".join(map(ascii, names[:12])) + (", ..." if len(names) > 12 else "")
        raise DataError(f"data.num_classes is {num_classes}, but column {column!r} has {len(names)} classes: {listed}")
    return names


def read_labels(rows: datasets.Dataset, column: str, names: Sequence[str], split: str) -> np.ndarray:
    """Return the class numbers, (N,) int64, each from 0 to the number of classes - 1.

    Raises:
        DataError: A label is missing, or is not one of the classes. The message names the row.
    """
    values = _values(rows, column)
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise DataError(f"row {row} of split {split!r} has no label (null); remove the row, or label it")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        numbers = pc.index_in(values.cast(pa.string()), value_set=pa.array(names, pa.string())).fill_null(-1)
    else:
        numbers = pc.min_element_wise(values, pa.scalar(2**62, values.type)) if values.type == pa.uint64() else values
    labels = numbers.cast(pa.int64()).to_numpy().copy()  # torch cannot use the read-only memory of Arrow
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        label = values[int(wrong[0])].as_py()
        expected = "one of the classes of the training data" if isinstance(label, str) else f"0 to {len(names) - 1}"
        raise DataError(
            f"row {wrong[0]} of split {split!r} has label {label!r}, expected {expected}; use a labeled split (unlabeled "
            "test splits carry -1)"
        )
    return labels


def image_cells(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return the image column alone, without decoding its images."""
    cells, typed = rows.select_columns([column]), isinstance(rows.features[column], datasets.Image)
    return cells.cast_column(column, datasets.Image(decode=False)) if typed else cells


def open_image(cell: Any, homes: Sequence[Path]) -> Image.Image:
    """Open the image in a cell of `image_cells`: encoded bytes, the path of a file in `homes`, or an array of pixels.

    Raises:
        DataError: The cell is empty, its file does not belong to the source, or it is not an array of 8-bit pixels.
    """
    if isinstance(cell, list):
        return Image.fromarray(_pixels(np.asarray(cell)))
    file = _file_of(cell, homes)
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def file_bytes(cell: Any, homes: Sequence[Path]) -> bytes:
    """Return the bytes of an encoded image; empty for an array of pixels."""
    file = b"" if isinstance(cell, list) else _file_of(cell, homes)
    return file if isinstance(file, bytes) else file.read_bytes()


def file_sizes(cells: datasets.Dataset, column: str) -> np.ndarray:
    """Return the size of each encoded image in bytes, (N,) int64; 0 for arrays of pixels and missing images."""
    sizes: list[int] = []
    for part in cells.with_format("arrow").iter(1000):
        values, paths = part.column(column), pa.nulls(len(part))
        if pa.types.is_struct(values.type):
            paths = pc.struct_field(values, "path") if values.type.get_field_index("path") >= 0 else paths
            values = pc.struct_field(values, "bytes")
        is_binary = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
        stored = pc.binary_length(values) if is_binary else pa.nulls(len(part))
        for size, path in zip(stored.to_pylist(), paths.to_pylist(), strict=True):
            sizes.append(os.path.getsize(path) if size is None and path and os.path.isfile(path) else size or 0)
    return np.array(sizes, dtype=np.int64)


def _file_of(cell: Any, homes: Sequence[Path]) -> bytes | Path:
    """Return the encoded image of a cell, or the path of its file."""
    data, path = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is not None:
        return data
    if not path:
        raise DataError("has no image (null); remove the row")
    if not is_inside(Path(path), tuple(homes)):
        raise DataError(f"is the file {path!r}, which does not belong to the source; store the images in the source itself")
    return Path(path)


def _pixels(array: np.ndarray) -> np.ndarray:
    """Return pixels as uint8, (H, W) or (H, W, C) with 3 or 4 channels. Channels may be last or, if not, first."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not fits or not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise DataError(
            f"is an array {array.shape} of {array.dtype}, expected integers from 0 to 255, (H, W), (H, W, C) or (C, H, W); "
            "scale the values to that range, or store images"
        )
    return np.ascontiguousarray(array, dtype=np.uint8)


def _only(found: Sequence[str], kind: str, key: str, rows: datasets.Dataset) -> str:
    if len(found) == 1:
        return found[0]
    many = (
        f"more than one column with {'images' if kind == 'Image' else 'labels'}" if found else f"no column of type {kind}"
    )
    raise DataError(f"the data has {many}; set data.{key} to one of {_listed(rows)}")


def _named(name: str, key: str, rows: datasets.Dataset) -> Any:
    if name not in rows.features:
        raise DataError(f"data.{key} is {name!r}, but the columns are {_listed(rows)}")
    return rows.features[name]


def _listed(rows: datasets.Dataset) -> str:
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in rows.features.items())


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _is_label(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and (
        "int" in feature.dtype or "string" in feature.dtype or feature.dtype == "bool"
    )


def _is_encoded(feature: Any) -> bool:
    """Return whether cells are the bytes of image files, structs with such bytes, or arrays of 8-bit pixels."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return feature.dtype == "uint8"
    return isinstance(feature, datasets.Value) and "binary" in feature.dtype


def _dimensions(feature: Any) -> int:
    """Return the number of dimensions of a feature with integers: 0 for a number, 1 for a list; -1 for other features."""
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return len(feature.shape) if "int" in feature.dtype else -1
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _dimensions(feature.feature)
        return inner if inner < 0 else inner + 1
    return 0 if isinstance(feature, datasets.Value) and "int" in feature.dtype else -1


def _values(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    return values.cast(pa.string()) if pa.types.is_string_view(values.type) else values
