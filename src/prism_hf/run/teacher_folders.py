"""Squeezed teachers of a run: where they are, and whether they are what was trained."""

from __future__ import annotations

from pathlib import Path

from ..errors import DamagedError, StageError
from ..images import SourceData
from ..models import is_squeezed, read_squeezed, teacher_folder
from ..recipe import Recipe


def folder_of(name: str, recipe: Recipe, root: Path, data: SourceData) -> Path | None:
    """The folder of a `squeeze:` teacher, `None` for other teachers.

    Raises:
        StageError: It is not trained yet.
        TeacherError: It was trained on other images than the source holds now.
    """
    if name not in recipe.squeezed_teachers:
        return None
    folder = trained_folder(name, recipe, root)
    read_squeezed(folder, data)
    return folder


def trained_folder(name: str, recipe: Recipe, root: Path) -> Path:
    """The folder of a `squeeze:` teacher.

    Raises:
        StageError: It is not trained yet.
    """
    folder = teacher_folder(name, recipe, root)
    if not is_squeezed(folder):
        raise StageError(
            f"teacher {name!r} is not trained yet in {folder.parent}; run recipes/squeeze.py (or --stage squeeze) "
            "first, or name its folder with --teachers DIR"
        )
    return folder


def squeezed_weights(folder: Path, loaded_sha256: str | None = None) -> str | None:
    """SHA-256 of the weights of a squeezed teacher as they were stored; `None` if an earlier version did not say.

    Args:
        folder: The teacher.
        loaded_sha256: Of the weights that were loaded, to be compared.

    Raises:
        DamagedError: The loaded weights are not those that were stored.
    """
    expected = read_squeezed(folder).weights_sha256
    if None not in (expected, loaded_sha256) and expected != loaded_sha256:
        raise DamagedError(
            f"the weights in {folder} were changed after they were written; --stage squeeze sets them aside "
            "and trains again"
        )
    return expected


def squeezed_top1(recipe: Recipe, root: Path, data: SourceData) -> dict[str, float]:
    """Score of each squeezed teacher on the test part, in [0, 1]."""
    folders = {name: teacher_folder(name, recipe, root) for name in recipe.squeezed_teachers}
    return {name: read_squeezed(folder, data).test_top1 for name, folder in folders.items()}
