"""Convert the original Fashion-MNIST files to a dataset folder, for machines that cannot reach the Hub.

    python recipes/fashion/to_parquet.py IDX_FOLDER OUT      # e.g. /usr/share/datasets/fashion-mnist outputs/fashion-mnist

IDX_FOLDER contains the four original files (`train-images-idx3-ubyte.gz` and so on). The Debian package
`dataset-fashion-mnist` installs them. Use OUT instead of the Hub id `zalando-datasets/fashion_mnist`: with `--data OUT`
or `data.source=OUT`. It has the same classes and splits.
"""

import argparse
import gzip
import struct
import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import datasets
import numpy as np
from PIL import Image

from prism_hf.cli.options import run_command
from prism_hf.errors import DataError
from prism_hf.runtime.store import draft_folder, swap_folder, writing

CLASSES = (
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
IMAGES, LABELS = 2051, 2049
"""Magic numbers of IDX files of unsigned bytes, with three dimensions and with one."""


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an IDX file as uint8: (N, 28, 28) images or (N,) labels.

    Raises:
        DataError: The file is missing, truncated, or of another kind.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
        actual, count = struct.unpack_from(">II", content)
        shape = (count,) if magic == LABELS else (count, *struct.unpack_from(">II", content, 8))
        if actual != magic:
            raise ValueError(f"magic number {actual}, expected {magic}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(
            f"{str(path)!r} is not the expected IDX file ({error}); give the folder of the four original .gz files"
        ) from error


def read_split(folder: Path, prefix: str, count: int) -> datasets.Dataset:
    """Read one split, with images as PNG."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", IMAGES)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", LABELS)
    if not len(images) == len(labels) == count or labels.max() >= len(CLASSES):
        raise DataError(f"{prefix}: {len(images)} images and {len(labels)} labels; expected {count} of each, in 10 classes")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def main(args: argparse.Namespace) -> None:
    splits = {name: read_split(args.source, *where) for name, where in SPLITS.items()}

    draft = draft_folder(args.out)
    with writing(args.out):
        for name, rows in splits.items():
            rows.to_parquet(str(draft / f"{name}-00000-of-00001.parquet"))
    swap_folder(draft, args.out)
    sys.stdout.write(f"{args.out}: " + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IDX_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
