"""Trackers: losses, the verifier's accuracy and pictures of a run, sent through Accelerate."""

from __future__ import annotations

import json

from accelerate import Accelerator
from torch import Tensor

from ..recipe import flat_values, public_recipe
from .context import Run


def start_trackers(run: Run) -> None:
    """Open the trackers, if any, with the recipe's values as their config; local paths stay here."""
    if run.accelerator.log_with:
        flat = {key: _scalar(value) for key, value in flat_values(public_recipe(run.recipe)).items()}
        run.accelerator.init_trackers("prism-hf", config=flat)


def _scalar(value: object) -> object:
    # TensorBoard's tracker takes nothing but scalars.
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def log_pictures(accelerator: Accelerator, name: str, images_uint8: Tensor, step: int) -> None:
    """Send one picture, (C, H, W) uint8, to every tracker that takes pictures."""
    rgb = images_uint8.expand(3, -1, -1)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: rgb.unsqueeze(0).numpy()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: [rgb.permute(1, 2, 0).numpy()]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(rgb.permute(1, 2, 0).numpy())}, step=step)
