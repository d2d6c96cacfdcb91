"""What can be found wrong before anything costs time, beyond a single module's own checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import timm

from ..errors import OutputError, RecipeError, TeacherError
from ..images.open_source import local_folder
from ..images.source import SourceData
from ..method.alignment import BNAlignment
from ..models.build import check_network
from ..models.features import classifier_of
from ..models.teacher import Teacher
from ..recipe.describe import space_needed
from ..recipe.schema import SQUEEZE_PREFIX, Recipe
from ..runtime.store import files_below
from ..runtime.units import size_text


def check_verifier(recipe: Recipe, loaded: Mapping[str, Teacher]) -> None:
    """A verifier is another architecture than every network in the loss, whatever it is called.

    Args:
        recipe: Names verifier and teachers.
        loaded: Those of them that are not squeezed.

    Raises:
        RecipeError: The same architecture teaches.
        TeacherError: It has no features to measure similarity with.
    """
    name = recipe.teachers.verifier
    if name is None:
        return

    def architecture(teacher: str) -> str:
        return loaded[teacher].architecture if teacher in loaded else teacher.removeprefix(SQUEEZE_PREFIX)

    for teacher in recipe.teachers.synthesis_names:
        if architecture(teacher) == architecture(name):
            raise RecipeError(
                f"verifier {name!r} has the architecture of teacher {teacher!r} ({architecture(name)}); a verifier must be "
                "held out, name another architecture"
            )
    if name in loaded and classifier_of(loaded[name].model) is None:
        raise TeacherError(f"verifier {name!r} has no linear classifier to take features from; name another one")


def check_apart(folder: Path, source: str) -> None:
    """Refuse an output folder inside the data: what is written there would be read as data by the next launch.

    Raises:
        OutputError: It is inside.
    """
    data = None if source == "digits" else local_folder(source)
    if data is not None and folder.resolve().is_relative_to(data.resolve()):
        raise OutputError(f"output {str(folder)!r} is inside the data {source!r}; use another folder (--output DIR)")


def missing_space(recipe: Recipe, folder: Path, *, processes: int, control: bool = True) -> int:
    """Bytes that a run still needs on the disk, at most.

    Args:
        recipe: What will be made.
        folder: The output folder; what is there already counts as done.
        processes: Each keeps a checkpoint.
        control: Whether random real images are packaged too.
    """
    needed = sum(space_needed(recipe, processes=processes, control=control).values())
    there = sum(path.stat().st_size for name in ("work", "dataset", "control") for path in files_below(folder / name))
    return max(0, needed - there)


def check_space(missing: int, folder: Path) -> None:
    """Compare the space that is still needed with what is free, before anything is written.

    Args:
        missing: Bytes, from `missing_space`.
        folder: The output folder.

    Raises:
        OutputError: Too little: says how much is needed and how much there is.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise OutputError(
            f"output {str(folder)!r} needs about {size_text(missing)} and {size_text(free)} are free; make space, "
            "use another disk (--output DIR), or lower synthesis.ipc or relabel.epochs"
        )


def inputs_of(recipe: Recipe, data: SourceData, loaded: Mapping[str, Teacher]) -> dict[str, object]:
    """What the names in a recipe stand for now: contents of the data, weights of the teachers that are not squeezed."""
    weights = {
        name: teacher.weights_sha256 for name, teacher in sorted(loaded.items()) if name not in recipe.squeezed_teachers
    }
    return {"train": data.train.content, "test": data.test.content, "teachers": weights}


def check_inputs(path: Path, inputs: Mapping[str, object]) -> None:
    """Compare with what an earlier launch recorded at `path`, if there was one.

    Raises:
        OutputError: Data or teachers have changed behind their names.
    """
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != inputs:
        raise OutputError(
            f"the data or the teachers of this run have changed since it was started (see {path}); what is finished there "
            "would not fit. Use another folder (--output DIR)"
        )


def check_architectures(recipe: Recipe) -> None:
    """Fail before any training if a `squeeze:` name is no timm architecture, or could never align anything.

    Raises:
        TeacherError: Names the teacher.
    """
    for name in recipe.squeezed_teachers:
        architecture = name.removeprefix(SQUEEZE_PREFIX)
        if not timm.is_model(architecture):
            raise TeacherError(f"teacher {name!r}: timm knows no such architecture; timm.list_models() lists all")
        network = check_network(architecture, num_classes=recipe.data.num_classes, channels=3, size=recipe.data.size)
        if name in recipe.bn_candidates:
            BNAlignment(network, name=name)
        if name == (recipe.teachers.verifier or recipe.teachers.logit) and classifier_of(network) is None:
            raise TeacherError(
                f"teacher {name!r} has no linear classifier, so its features cannot measure similarity; "
                "name another verifier"
            )
