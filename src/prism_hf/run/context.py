"""A run: one recipe in one output folder, on some processes, with its real data and networks.

DIR/recipe.yaml     whose folder this is
DIR/dataset/        the Hub-ready folder
DIR/control/        random real images, packaged the same way
DIR/student/        one student, for timm and transformers
DIR/report.json     every figure of the table
DIR/work/           what the stages leave for each other
DIR/logs/           run.log, trackers
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from ..errors import DamagedError, RecipeError, StageError
from ..images import SourceData, load_source
from ..method import Precision
from ..models import Teacher, check_teacher, is_squeezed, load_teacher, read_squeezed, teacher_folder
from ..recipe import STAGES, TRACKERS, DataRecipe, Recipe
from ..runtime import EVERY_S, read_json, share, write_json
from .artifacts import TIMES, Artifacts

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class Loaded:
    """Real data and networks that are in memory: each is loaded once. The runs of a comparison share them."""

    data: dict[DataRecipe, SourceData] = field(default_factory=dict)
    teachers: dict[tuple[str, Path | None], Teacher] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe in one output folder, on some processes."""

    recipe: Recipe
    folder: Path
    teachers_root: Path  # where squeezed teachers are kept; recipes may share it
    accelerator: Accelerator  # processes, device, trackers
    checkpoint_s: float = EVERY_S  # seconds between two checkpoints of a long job
    allow_partial: bool = False  # go on without the jobs whose numbers went bad
    with_control: bool = True  # make random real images beside the distilled ones, as every recipe by itself does
    title: str = ""  # what the run is called beside its stages, where it is one of many
    loaded: Loaded = field(default_factory=Loaded)

    @property
    def wants_control(self) -> bool:
        """Whether there is a control to make: a dataset of random real images is one itself."""
        return self.with_control and self.recipe.method != "random"

    @property
    def dataset(self) -> Path:
        """The Hub-ready folder."""
        return self.folder / "dataset"

    @property
    def control(self) -> Path:
        """Random real images, packaged the same way."""
        return self.folder / "control"

    @property
    def work(self) -> Path:
        """What the stages leave for each other."""
        return self.folder / "work"

    @property
    def data(self) -> SourceData:
        """The real data, loaded when first needed."""
        # No barrier: a process that needs no data in some stage must not keep the others waiting. Downloads are safe, the
        # libraries lock their caches.
        wanted = self.recipe.data
        if wanted not in self.loaded.data:
            self.loaded.data[wanted] = load_source(wanted)
        return self.loaded.data[wanted]

    def teachers(self, names: Sequence[str]) -> dict[str, Teacher]:
        """Networks by name, each loaded once and checked against the data."""
        return {name: self._teacher(name) for name in dict.fromkeys(names)}

    def _teacher(self, name: str) -> Teacher:
        folder = self._folder_of(name)
        if (name, folder) not in self.loaded.teachers:
            squeezed = None if folder is None else {name: folder}
            teacher = load_teacher(name, device=self.accelerator.device, squeezed=squeezed)
            # Teachers of earlier versions do not say what their weights were.
            if folder is not None and read_squeezed(folder).weights_sha256 not in (None, teacher.weights_sha256):
                raise DamagedError(
                    f"the weights in {folder} were changed after they were written; --stage squeeze sets them aside "
                    "and trains again"
                )
            check_teacher(teacher, class_names=self.data.class_names, channels=self.recipe.data.channels)
            self.loaded.teachers[name, folder] = teacher
        return self.loaded.teachers[name, folder]

    def _folder_of(self, name: str) -> Path | None:
        """The folder of a `squeeze:` teacher that was trained on these very data; `None` for other teachers."""
        if name not in self.recipe.squeezed_teachers:
            return None
        folder = self.trained_folder(name)
        read_squeezed(folder, self.data)
        return folder

    def trained_folder(self, name: str) -> Path:
        """The folder of a `squeeze:` teacher; a `StageError` if it is not trained yet."""
        folder = teacher_folder(name, self.recipe, self.teachers_root)
        if not is_squeezed(folder):
            raise StageError(
                f"teacher {name!r} is not trained yet in {folder.parent}; run recipes/squeeze.py (or --stage squeeze) "
                "first, or name its folder with --teachers DIR"
            )
        return folder

    @property
    def squeezed_top1(self) -> dict[str, float]:
        """Score of each squeezed teacher on the test part, in [0, 1]."""
        folders = {name: teacher_folder(name, self.recipe, self.teachers_root) for name in self.recipe.squeezed_teachers}
        return {name: read_squeezed(folder, self.data).test_top1 for name, folder in folders.items()}

    @property
    def verifier(self) -> Teacher | None:
        """The held-out judge, if the recipe names one."""
        return self.judge if self.recipe.teachers.verifier else None

    @property
    def judge(self) -> Teacher:
        """The network whose features measure similarity: the verifier, or else the logit teacher."""
        return self._teacher(self.recipe.teachers.verifier or self.recipe.teachers.logit)

    @cached_property
    def artifacts(self) -> Artifacts:
        """What the stages leave for each other; its keys need the weights of every teacher."""
        weights = {}
        for name in self.recipe.all_teachers:
            folder = self._folder_of(name)
            known = None if folder is None else read_squeezed(folder).weights_sha256
            weights[name] = known or self._teacher(name).weights_sha256
        return Artifacts(self.work, self.recipe, self.data.train.content, self.data.class_names, weights)

    @property
    def precision(self) -> Precision:
        """Of the teachers' passes in synthesis, as `accelerate launch --mixed_precision` asks; all else is float32."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "float32"

    @property
    def hardware(self) -> dict[str, object]:
        """What a result may depend on beyond the recipe, up to rounding."""
        threads = torch.get_num_threads()
        return {"device": self.accelerator.device.type, "threads": threads, "precision": self.precision}

    def share(self, stage: str, tasks: Sequence[T], **how: Any) -> None:
        """Do the tasks of a stage that are not done, shared over the processes; see `runtime.share`."""
        share(self.accelerator, stage, tasks, notes=self.work, title=self.title, **how)

    def say(self, text: str) -> None:
        """Write one log line, on the main process only; accelerate's own logger would prefix it with the rank."""
        if self.accelerator.is_main_process:
            log.info(text)

    def warn(self, text: str) -> None:
        """Write one log line about what went wrong on this process."""
        rank = self.accelerator.process_index
        log.warning(f"process {rank}: {text}" if rank else text)

    def times(self) -> dict[str, float]:
        """Seconds spent in each stage so far, all launches added up (those that were killed outright left none)."""
        path = self.work / TIMES
        return read_json(path) if path.is_file() else {}

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
                write_json(self.work / TIMES, {name: spent[name] for name in STAGES if name in spent})


def make_accelerator(folder: Path | None = None, *, log_with: str | None = None) -> Accelerator:
    """Return the processes of this launch, as `accelerate launch` set them up, with trackers in the output folder."""
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
    return Accelerator(
        # Without this flag, processes on a machine without GPU would not know of each other.
        cpu=not torch.cuda.is_available(),
        log_with=log_with,
        project_dir=str(folder / "logs") if folder is not None else None,
        # Processes meet only between stages, and one may have hours more to do than another.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )


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
