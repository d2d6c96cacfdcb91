"""Where a run keeps its things, and what belongs to it: the output folder, the processes, progress and trackers.

DIR/recipe.yaml     whose folder this is
DIR/dataset/        the Hub-ready folder
DIR/control/        random real images, packaged the same way
DIR/student/        one student, for timm and transformers
DIR/report.json     every figure of the table
DIR/work/           what the stages leave for each other
DIR/logs/           trackers
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from .errors import OutputError, RecipeError
from .plan import STAGES, TRACKERS
from .recipe import Recipe, to_dict
from .recipe_file import differing_keys, dump_recipe, load_recipe
from .storage import write_bytes, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe in one output folder, on some processes.

    Attributes:
        recipe: What to do.
        folder: The output folder.
        teachers_root: Where squeezed teachers are kept; recipes may share it.
        accelerator: Processes, device, trackers.
    """

    recipe: Recipe
    folder: Path
    teachers_root: Path
    accelerator: Accelerator

    @property
    def dataset(self) -> Path:
        """The Hub-ready folder."""
        return self.folder / "dataset"

    @property
    def control(self) -> Path:
        """Random real images, packaged the same way."""
        return self.folder / "control"

    @property
    def student(self) -> Path:
        """One student, for timm and transformers."""
        return self.folder / "student"

    @property
    def work(self) -> Path:
        """What the stages leave for each other."""
        return self.folder / "work"

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def say(self, text: str) -> None:
        """One log line, from the main process only; accelerate's own logger would prefix it with the rank."""
        if self.accelerator.is_main_process:
            log.info(text)

    @property
    def hardware(self) -> dict[str, object]:
        """What a result may depend on beyond the recipe, up to rounding."""
        return {"device": self.accelerator.device.type, "threads": torch.get_num_threads(), "precision": "float32"}

    def times(self) -> dict[str, float]:
        """Seconds spent in each stage so far, all launches added up (those that were killed outright left none)."""
        path = self.work / "times.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a stage to its record."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.accelerator.is_main_process:
                spent = self.times()
                spent[stage] = round(spent.get(stage, 0.0) + time.perf_counter() - started, 2)
                write_json(self.work / "times.json", {name: spent[name] for name in STAGES if name in spent})


def make_accelerator(folder: Path | None = None, *, log_with: str | None = None, threads: int | None = None) -> Accelerator:
    """The processes of this launch, as `accelerate launch` set them up.

    Args:
        folder: Output folder, for trackers that write files.
        log_with: `tensorboard`, `wandb` or `trackio`.
        threads: CPU threads per process; part of what makes CPU results the same byte for byte.

    Raises:
        RecipeError: The tracker is unknown or not installed.
    """
    if log_with is not None:
        _check_tracker(log_with)
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


def _check_tracker(name: str) -> None:
    from importlib.util import find_spec

    if name not in TRACKERS:
        raise RecipeError(f"--log-with {name!r} is unknown; use one of {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise RecipeError(f"--log-with {name}: the package is not installed; pip install {name}")


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Find out whether `folder` is, or can become, the output of `recipe`; writes nothing.

    Raises:
        OutputError: It belongs to another recipe (names the keys that differ), or holds other things.
    """
    marker = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file; give a folder with --output")
    if marker.is_file():
        try:
            theirs = load_recipe(marker)
        except RecipeError as error:
            raise OutputError(
                f"output {str(folder)!r} holds a recipe that cannot be read ({error}); use --output"
            ) from error
        if theirs.fingerprint() != recipe.fingerprint():
            keys = ", ".join(differing_keys(theirs, recipe))
            raise OutputError(
                f"output {str(folder)!r} belongs to another recipe; these keys differ: {keys}. "
                "Use another folder (--output DIR), or move this one away"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and holds no run; use another folder (--output DIR)")


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Make `folder` the output of `recipe`, or find that it is already; see `check_folder`."""
    check_folder(folder, recipe)
    try:
        if not (folder / "recipe.yaml").is_file():
            write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    except OSError as error:
        raise OutputError(f"output {str(folder)!r} cannot be written ({error.strerror}); use --output DIR") from error


def start_trackers(run: Run) -> None:
    """Open the trackers, if any, with the recipe's values as their config."""
    if run.accelerator.log_with:
        flat = {key: _scalar(value) for key, value in _flat(to_dict(run.recipe), "")}
        run.accelerator.init_trackers("prism-hf", config=flat)


def _flat(values: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


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
