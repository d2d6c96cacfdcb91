"""The processes of a launch, and the trackers that they send losses, accuracies and pictures to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from ..errors import RecipeError
from ..recipe import TRACKERS, Recipe, public_recipe, to_dict


def make_accelerator(folder: Path | None = None, *, log_with: str | None = None, threads: int | None = None) -> Accelerator:
    """The processes of this launch, as `accelerate launch` set them up.

    Args:
        folder: Output folder, for trackers that write files.
        log_with: `tensorboard`, `wandb` or `trackio`.
        threads: CPU threads per process; part of what makes CPU results the same byte for byte.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise RecipeError(
            f"--mixed_precision {precision} has too narrow a range for BN statistics and losses; use `bf16`, or `no` "
            "for float32"
        )
    if log_with is not None and log_with not in TRACKERS:
        raise RecipeError(f"--log-with {log_with!r} is unknown; use one of {', '.join(TRACKERS)}")
    if log_with is not None and find_spec(log_with) is None:
        raise RecipeError(f"--log-with {log_with}: the package is not installed; pip install {log_with}")
    if threads is not None:
        torch.set_num_threads(threads)
    return Accelerator(
        # Without this flag, processes on a machine without GPU would not know of each other.
        cpu=not torch.cuda.is_available(),
        log_with=log_with,
        project_dir=str(folder / "logs") if folder is not None else None,
        # Processes meet only between stages, and one may have hours more to do than another.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Open the trackers, if any, with the recipe's values as their config; local paths stay here."""
    if accelerator.log_with:
        # TensorBoard's tracker takes nothing but scalars.
        config = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in _flat(to_dict(public_recipe(recipe)), "")
        }
        accelerator.init_trackers("prism-hf", config=config)


def _flat(values: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def log_picture(accelerator: Accelerator, name: str, image_uint8: Tensor, step: int) -> None:
    """Send one picture, (C, H, W) uint8, to every tracker that takes pictures."""
    rgb = image_uint8.expand(3, -1, -1)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: rgb.unsqueeze(0).numpy()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: [rgb.permute(1, 2, 0).numpy()]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(rgb.permute(1, 2, 0).numpy())}, step=step)
