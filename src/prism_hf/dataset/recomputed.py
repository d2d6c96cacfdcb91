"""Soft labels that are not stored: the teachers compute them again when a student trains (codec `seed`)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, TeacherError
from ..images import ViewRows, from_columns
from ..method import relabel_epoch
from ..models import Teacher, folded
from .reader import DistilledDataset


def with_teachers(source: DistilledDataset, teachers: Sequence[Teacher]) -> DistilledDataset:
    """Return a dataset of codec `seed` with its soft labels, which these teachers compute for one epoch at a time.

    The teachers are those of the recipe's `relabel.teachers`, in order. On the same type of device, with the same number of
    threads, the labels equal those that `float16` would have stored, bit for bit.

    Raises:
        DataError: The dataset has no recipe, or its views are not those that the recipe draws.
        TeacherError: A teacher has other weights than provenance.json states.
    """
    recipe = source.recipe
    if recipe is None:
        raise DataError("it stores no soft labels (codec seed), and no recipe.yaml to compute them from; add the file")
    for name, teacher in zip(recipe.relabel.teachers, teachers, strict=True):
        if source.teacher_weights.get(name) != teacher.weights_sha256:
            raise TeacherError(
                f"teacher {name!r} has other weights than provenance.json states; this dataset stores no soft labels "
                "(relabel.codec seed), so they can only be computed with the same weights"
            )
    prepared = [folded(teacher) for teacher in teachers]

    @lru_cache(maxsize=1)
    def labeled(epoch: int) -> tuple[ViewRows, Tensor]:
        columns = relabel_epoch(epoch, source.images_uint8, prepared, recipe.relabel, seed=recipe.seed)
        rows, stored = from_columns(columns), source.epoch(epoch)[0]
        if not (torch.equal(rows.image_index, stored.image_index) and torch.equal(rows.view.crop, stored.view.crop)):
            raise DataError(f"the views of epoch {epoch} are not those that its recipe.yaml draws; download it again")
        return rows, torch.from_numpy(np.ascontiguousarray(columns["teacher_logits"]))

    def views(epoch: int, rows: range) -> tuple[ViewRows, Tensor]:
        all_rows, logits = labeled(epoch)
        part = slice(rows.start, rows.stop)
        return all_rows[part], logits[part]

    return replace(source, codec="float16", views=views)
