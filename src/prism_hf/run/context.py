"""A run: one recipe in one output folder, with its real data and networks, on one or more processes.

DIR/recipe.yaml     the recipe that the folder belongs to
DIR/dataset/        the dataset, ready to push to the Hub
DIR/control/        random real images, packaged the same way
DIR/student/        one student, which timm and transformers can load
DIR/report.json     all numbers of the results table
DIR/work/           intermediate files that the stages exchange
DIR/logs/           run.log and the files of trackers
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

from ..errors import DamagedError, RecipeError, StageError, TeacherError
from ..images import SourceData, load_source, no_images
from ..method import Compile, Precision, describe_norms
from ..models import Teacher, fit_teacher, is_squeezed, load_teacher, read_squeezed, teacher_folder
from ..recipe import NO_IMAGES, STAGES, TRACKERS, DataRecipe, Recipe
from ..runtime import EVERY_S, deal, read_json, share, write_json
from .artifacts import TIMES, Artifacts

_CPU_INFO = Path("/proc/cpuinfo")
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class Loaded:
    """The real data and networks in memory, each loaded once. The runs of a comparison share them."""

    data: dict[DataRecipe, SourceData] = field(default_factory=dict)
    teachers: dict[tuple[str, Path | None], Teacher] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe in one output folder, on one or more processes."""

    recipe: Recipe
    folder: Path
    teachers_root: Path  # folder of the squeezed teachers; recipes may share it
    accelerator: Accelerator  # processes, device, trackers
    checkpoint_s: float = EVERY_S  # seconds between checkpoints of a long job
    allow_partial: bool = False  # continue without the jobs that failed
    with_control: bool = True  # also make random real images, as every run outside a comparison does
    part: tuple[int, int] | None = None  # (2, 3): do the second third of the jobs and of the views; `None`: do all
    compile: Compile = "auto"  # how the passes of teachers are sped up in synthesis; see `synthesize`
    title: str = ""  # name of the run in front of its stage in the progress bar, if it is one of many
    loaded: Loaded = field(default_factory=Loaded)

    @property
    def wants_control(self) -> bool:
        """True if the run makes a control. There is none without real images, nor for random real images themselves."""
        return self.with_control and self.recipe.method != "random" and self.recipe.data.source != NO_IMAGES

    @property
    def dataset(self) -> Path:
        """The folder of the dataset, ready to push to the Hub."""
        return self.folder / "dataset"

    @property
    def control(self) -> Path:
        """The folder of random real images, packaged like the dataset."""
        return self.folder / "control"

    @property
    def work(self) -> Path:
        """The folder of the files that the stages exchange."""
        return self.folder / "work"

    @property
    def data(self) -> SourceData:
        """The real data, loaded on first use."""
        # No barrier: a process that needs no data in a stage must not block the others. Concurrent downloads are safe,
        # because the libraries lock their caches.
        wanted = self.recipe.data
        if wanted not in self.loaded.data:
            none = wanted.source == NO_IMAGES
            self.loaded.data[wanted] = no_images(wanted, self._known_classes()) if none else load_source(wanted)
        return self.loaded.data[wanted]

    def teachers(self, names: Sequence[str]) -> dict[str, Teacher]:
        """Return networks by name. Each is loaded once and checked against the data."""
        return {name: self._teacher(name) for name in dict.fromkeys(names)}

    def _teacher(self, name: str) -> Teacher:
        folder = self._folder_of(name)
        if (name, folder) not in self.loaded.teachers:
            squeezed = None if folder is None else {name: folder}
            teacher = load_teacher(name, device=self.accelerator.device, squeezed=squeezed)
            # Teachers saved by earlier versions do not record the hash of their weights.
            if folder is not None and read_squeezed(folder).weights_sha256 not in (None, teacher.weights_sha256):
                raise DamagedError(
                    f"the weights in {folder} were changed after they were written; run --stage squeeze to set them "
                    "aside and train again"
                )
            teacher = fit_teacher(teacher, class_names=self.data.class_names, channels=self.recipe.data.channels)
            self.loaded.teachers[name, folder] = teacher
            if name in self.recipe.bn_candidates:
                self.say(f"teacher {name}: {describe_norms(teacher.model)}")
        return self.loaded.teachers[name, folder]

    def _known_classes(self) -> Sequence[str]:
        """Return the classes of the logit teacher, which names them if there are no real images."""
        name = self.recipe.teachers.logit
        names = load_teacher(name, device=torch.device("cpu")).label_names
        if names is None:
            raise TeacherError(f"data.source is none, but teacher {name!r} does not name its classes; use another one")
        return names

    def _folder_of(self, name: str) -> Path | None:
        """Return the folder of a `squeeze:` teacher that was trained on this data; `None` for other teachers."""
        if name not in self.recipe.squeezed_teachers:
            return None
        folder = self.trained_folder(name)
        read_squeezed(folder, self.data)
        return folder

    def trained_folder(self, name: str) -> Path:
        """Return the folder of a `squeeze:` teacher, or raise a `StageError` if it is not trained yet."""
        folder = teacher_folder(name, self.recipe, self.teachers_root)
        if not is_squeezed(folder):
            raise StageError(
                f"teacher {name!r} is not trained yet in {folder.parent}; run `prism-hf squeeze` (or --stage squeeze) "
                "first, or specify the folder of teachers with --teachers DIR"
            )
        return folder

    @property
    def squeezed_top1(self) -> dict[str, float]:
        """Top-1 accuracy of each squeezed teacher on the test data, in [0, 1]."""
        folders = {name: teacher_folder(name, self.recipe, self.teachers_root) for name in self.recipe.squeezed_teachers}
        return {name: read_squeezed(folder, self.data).test_top1 for name, folder in folders.items()}

    @property
    def known_top1(self) -> dict[str, float]:
        """As `squeezed_top1`, for the teachers that are in their folder; an evaluation alone may have none."""
        known = {}
        for name in self.recipe.squeezed_teachers:
            folder = teacher_folder(name, self.recipe, self.teachers_root)
            if is_squeezed(folder):
                known[name] = read_squeezed(folder).test_top1
        return known

    @property
    def verifier(self) -> Teacher | None:
        """The held-out verifier, or `None` if the recipe does not name one."""
        return self.judge if self.recipe.teachers.verifier else None

    @property
    def judge(self) -> Teacher:
        """The network whose features measure similarity: the verifier, or the logit teacher if there is no verifier."""
        return self._teacher(self.recipe.teachers.verifier or self.recipe.teachers.logit)

    @cached_property
    def artifacts(self) -> Artifacts:
        """The files that the stages exchange. Their keys depend on the weights of every teacher."""
        weights = {}
        for name in self.recipe.all_teachers:
            folder = self._folder_of(name)
            recorded = None if folder is None else read_squeezed(folder).weights_sha256
            weights[name] = recorded or self._teacher(name).weights_sha256
        return Artifacts(self.work, self.recipe, self.data.train.content, self.data.class_names, weights)

    @property
    def precision(self) -> Precision:
        """Precision of the teachers in synthesis, from `accelerate launch --mixed_precision`. All else is float32."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "float32"

    @property
    def compile_reason(self) -> str:
        """The decision on compilation and its reason, for the log."""
        if self.compile != "auto":
            return f"compilation is {self.compile} (--compile)"
        if self.accelerator.device.type == "cuda":
            return "teachers are replayed as CUDA graphs (--compile off: step by step; on: compiled first)"
        why = "it takes a minute per teacher, and made small networks faster but mobile networks slower on CPUs"
        return f"compilation is off (auto: {why}; --compile on tries it)"

    @property
    def hardware(self) -> dict[str, object]:
        """Device, threads, precision and compilation, which can change a result through rounding."""
        threads, compiled = torch.get_num_threads(), {"compiled": True} if self.compile == "on" else {}
        return {"device": self.accelerator.device.type, "threads": threads, "precision": self.precision, **compiled}

    def share(self, stage: str, tasks: Sequence[T], *, parted: bool = False, **options: Any) -> None:
        """Do the unfinished tasks of a stage, divided over the processes; see `runtime.share`.

        With `parted`, a run that does only a part takes its share of the tasks, which every machine calculates alike.
        """
        if parted and self.part is not None:
            cost = options.get("cost") or options.get("size", lambda _: 1)
            number, count = self.part
            mine = deal([cost(task) for task in tasks], count)[number - 1]
            tasks = [tasks[position] for position in sorted(mine)]
        share(self.accelerator, stage, tasks, notes=self.work, title=self.title, **options)

    def say(self, text: str) -> None:
        """Log one line, on the main process only. Accelerate's own logger would prefix it with the rank."""
        if self.accelerator.is_main_process:
            log.info(text)

    def warn(self, text: str) -> None:
        """Log a warning from this process, with its rank unless it is the main process."""
        rank = self.accelerator.process_index
        log.warning(f"process {rank}: {text}" if rank else text)

    def times(self) -> dict[str, float]:
        """Return the seconds spent in each stage, summed over all launches except those that were killed."""
        path = self.work / TIMES
        return read_json(path) if path.is_file() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to the recorded time of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.accelerator.is_main_process:
                spent = self.times()
                spent[stage] = round(spent.get(stage, 0.0) + time.perf_counter() - started, 2)
                write_json(self.work / TIMES, {name: spent[name] for name in STAGES if name in spent})


def make_accelerator(folder: Path | None = None, *, log_with: str | None = None) -> Accelerator:
    """Return the accelerator of this launch, as `accelerate launch` configured it. Trackers write to DIR/logs."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise RecipeError(
            f"--mixed_precision {precision} has too narrow a range for BN statistics and losses; use `bf16`, or `no` "
            "for float32"
        )
    if log_with is not None and log_with not in TRACKERS:
        raise RecipeError(f"--log-with {log_with!r} is unknown; use one of {', '.join(TRACKERS)}")
    if log_with is not None and find_spec(log_with) is None:
        raise RecipeError(f"--log-with {log_with}: the package is not installed; run pip install {log_with}")
    accelerator = Accelerator(
        # Without this flag, the processes on a machine without a GPU would not form one group.
        cpu=not torch.cuda.is_available(),
        log_with=log_with,
        project_dir=str(folder / "logs") if folder is not None else None,
        # Processes synchronize only between stages, and one may have hours more work than another.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if precision == "bf16" and accelerator.device.type == "cpu" and accelerator.is_main_process and _lacks_bf16():
        log.warning("bf16 is slower than float32 on this CPU, which does not multiply it in hardware (AMX); use float32")
    return accelerator


def _lacks_bf16() -> bool:
    """Return whether this CPU has no units for bf16 matrices, as far as Linux says so."""
    if not _CPU_INFO.is_file():
        return False
    return not {"amx_bf16", "bf16"} & set(_CPU_INFO.read_text().split())  # of x86, of ARM


def log_picture(accelerator: Accelerator, name: str, image_uint8: Tensor, step: int) -> None:
    """Log one image, (C, H, W) uint8, to every tracker that supports images."""
    rgb = image_uint8.expand(3, -1, -1)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: rgb.unsqueeze(0).numpy()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: [rgb.permute(1, 2, 0).numpy()]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(rgb.permute(1, 2, 0).numpy())}, step=step)
