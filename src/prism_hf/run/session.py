"""What the stages of a run share: data, teachers by name, the files between stages, and the checks before any work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import DamagedError, StageError
from ..images.source import SourceData, load_source, real_rows
from ..method.alignment import BNAlignment
from ..method.start_images import SCORED, check_candidates, start_images
from ..models.build import check_network
from ..models.load import load_teachers
from ..models.squeeze import check_batch, is_squeezed, read_squeezed, teacher_folder
from ..models.teacher import Teacher, check_teacher
from ..recipe.plan import STAGES
from ..recipe.yaml_file import public_recipe
from ..runtime.store import write_json
from ..runtime.tensors import open_rows, write_rows
from .artifacts import Work
from .context import Run, check_place
from .preflight import check_apart, check_architectures, check_inputs, check_space, check_verifier, inputs_of, missing_space


class Session:
    """One run, and what its stages share; data and teachers are loaded once, when first needed.

    Args:
        run: Recipe, folder and processes.
        like: A session of the same data and teachers, whose loaded ones are used.
    """

    def __init__(self, run: Run, like: Session | None = None) -> None:
        self.run, self.recipe = run, run.recipe
        self.public = public_recipe(run.recipe)
        assert like is None or like.recipe.data == self.recipe.data
        self._data: SourceData | None = like.data if like else None
        self._teachers: dict[str, Teacher] = like._teachers if like else {}

    @property
    def data(self) -> SourceData:
        """The real data, loaded when first needed.

        No barrier here: a process that needs no data in some stage must not keep the others waiting. Downloads are safe,
        the libraries lock their caches.
        """
        if self._data is None:
            self._data = load_source(self.recipe.data)
        return self._data

    def check_stage(self, stage: str, *, fresh: bool = False) -> None:
        """Find out whether a stage can begin where the stages before it were left; writes nothing.

        Raises:
            StageError: A teacher is not trained, or there is no run.
        """
        if stage == "squeeze":
            return
        if stage != "synthesize" and (fresh or not (self.run.folder / "recipe.yaml").is_file()):
            before = STAGES[STAGES.index(stage) - 1]
            raise StageError(f"{self.run.folder} holds no run to {stage}; run --stage {before}, and what comes before it")
        for name in self.recipe.squeezed_teachers:
            self._squeezed_folder(name)

    def missing_space(self) -> int:
        """Bytes that this run still needs on the disk, at most."""
        processes = self.run.accelerator.num_processes
        return missing_space(self.recipe, self.run.folder, processes=processes, control=self.run.wants_control)

    def check(self, *, fresh: bool = False, space: bool = True) -> None:
        """Look at what can be wrong before anything costs time: disk space, Hub teachers, the data, images per class.

        Args:
            fresh: What an earlier run left in the folder is of no account: it will be moved aside.
            space: Look at disk space too; a comparison adds up that of its runs.

        Raises:
            PrismError: One line about what cannot be used.
        """
        recipe = self.recipe
        data = recipe.data
        check_place(self.run.teachers_root, "--teachers")
        check_apart(self.run.folder, data.source)
        if space:
            check_space(self.missing_space(), self.run.folder)
        check_network(recipe.evaluation.student, num_classes=data.num_classes, channels=data.channels, size=data.size)
        check_architectures(recipe)
        there = [name for name in recipe.all_teachers if name not in recipe.squeezed_teachers]
        loaded = self.teachers(there)
        for name in set(there) & set(recipe.bn_candidates):
            BNAlignment(loaded[name].model, name=name)
        check_verifier(recipe, loaded)
        check_batch(recipe, self.data)
        if recipe.synthesis.init != "noise":
            assert len(self.initial_rows) == recipe.num_images
        check_candidates(recipe, self.data)
        if not fresh:
            check_inputs(self.run.work / "inputs.json", inputs_of(recipe, self.data, loaded))

    def record_inputs(self) -> None:
        """Keep what the names in the recipe stood for, so that a later launch notices a change behind them."""
        write_json(self.run.work / "inputs.json", inputs_of(self.recipe, self.data, self._teachers))

    def teachers(self, names: Sequence[str]) -> dict[str, Teacher]:
        """Loaded and checked teachers, each once."""
        squeezed = {}
        for name in set(names) & set(self.recipe.squeezed_teachers):
            folder = self._squeezed_folder(name)
            read_squeezed(folder, self.data)
            squeezed[name] = folder
        missing = [name for name in dict.fromkeys(names) if name not in self._teachers]
        self._teachers |= load_teachers(missing, device=self.run.accelerator.device, squeezed=squeezed)
        for name in missing:
            if self._expected_weights(name) not in (None, self._teachers[name].weights_sha256):
                raise DamagedError(
                    f"the weights in {squeezed[name]} were changed after they were written; --stage squeeze sets them "
                    "aside and trains again"
                )
            check_teacher(self._teachers[name], class_names=self.data.class_names, channels=self.recipe.data.channels)
        return {name: self._teachers[name] for name in names}

    def verifier(self) -> Teacher | None:
        """The held-out judge, if the recipe names one."""
        name = self.recipe.teachers.verifier
        return self.teachers([name])[name] if name else None

    @cached_property
    def initial_rows(self) -> np.ndarray:
        """Rows of the real training images that synthesis starts from, class-major."""
        synthesis = self.recipe.synthesis
        return real_rows(self.data, synthesis.ipc, seed=self.recipe.seed, by_index=synthesis.init == "real_index")

    def start_images(self) -> Tensor | None:
        """Start images that the logit teacher chooses, (K * ipc, C, S, S) uint8, class-major; `None` for other inits.

        They are made by whoever asks first, and kept in DIR/work.
        """
        if self.recipe.synthesis.init not in SCORED:
            return None
        path, key = self.work.start_file, self.work.start_key
        if not self.work.is_whole(path, key):
            name = self.recipe.teachers.logit
            images = start_images(self.recipe, self.data, self.teachers([name])[name], device=self.run.accelerator.device)
            write_rows(path, [images.numpy()], tuple(images.shape), "uint8", {"key": key})
        return open_rows(path)

    def _squeezed_folder(self, name: str) -> Path:
        folder = teacher_folder(name, self.recipe, self.run.teachers_root)
        if not is_squeezed(folder):
            raise StageError(
                f"teacher {name!r} is not trained yet in {folder.parent}; run recipes/squeeze.py (or --stage squeeze) "
                "first, or name its folder with --teachers DIR"
            )
        return folder

    def _expected_weights(self, name: str) -> str | None:
        """SHA-256 of a squeezed teacher's weights, as it was stored; `None` for others."""
        if name not in self.recipe.squeezed_teachers:
            return None
        return read_squeezed(teacher_folder(name, self.recipe, self.run.teachers_root)).weights_sha256

    @cached_property
    def work(self) -> Work:
        """What the stages leave for each other; its keys need the weights of every teacher."""
        names = [name for name in self.recipe.all_teachers if self._needs_loading(name)]
        loaded = self.teachers(names)
        weights = {n: self._expected_weights(n) or loaded[n].weights_sha256 for n in self.recipe.all_teachers}
        return Work(self.run.work, self.recipe, {"train": self.data.train.content, "teachers": weights})

    def _needs_loading(self, name: str) -> bool:
        """Whether only loading a teacher tells which weights it has, or that it is missing."""
        if name not in self.recipe.squeezed_teachers:
            return True
        folder = teacher_folder(name, self.recipe, self.run.teachers_root)
        return not is_squeezed(folder) or read_squeezed(folder).weights_sha256 is None

    def squeezed_top1(self) -> dict[str, float]:
        """Score of each squeezed teacher on the test part, in [0, 1]."""
        result = {}
        for name in self.recipe.squeezed_teachers:
            facts = read_squeezed(teacher_folder(name, self.recipe, self.run.teachers_root), self.data)
            result[name] = facts.test_top1
        return result
