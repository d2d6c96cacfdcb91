"""Which real images synthesis starts from when the logit teacher has a say: typical ones, centres, or mosaics of patches.

Legend: N images of a class, B of them at once, C channels, S side of the working image, D features, K classes.

One class after the other, so that memory holds the losses or features of one class; nothing depends on the number of
processes or, beyond what the teacher itself computes, of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..errors import DataError
from ..images.pixels import to_reference, to_uint8
from ..images.source import ImageSplit, SourceData, check_class_size
from ..images.views import axis_matrix, draw_crop, resample
from ..models.features import penultimate_features
from ..models.teacher import Teacher
from ..recipe.plan import batch_ranges
from ..recipe.schema import Recipe
from ..recipe.synthesis import Mosaic
from ..runtime.seeds import derived_seed
from ..runtime.stop import raise_if_stopped

Rule = Literal["real_median", "real_kmeans"]
SCORED = ("real_median", "real_kmeans", "mosaic")
"""Inits in which the logit teacher has a say."""
_BATCH = 256
"""Images that a teacher is shown at once."""


def start_images(recipe: Recipe, data: SourceData, teacher: Teacher, *, device: torch.device) -> Tensor:
    """What synthesis starts from with init `real_median`, `real_kmeans` or `mosaic`.

    Args:
        recipe: Says which, and its seed.
        data: The real data.
        teacher: The logit teacher.
        device: Where it is.

    Returns:
        (K * ipc, C, S, S) uint8, class-major.

    Raises:
        DataError: A class has too few images.
        TeacherError: `real_kmeans` with a teacher that has no linear layer.
    """
    synthesis, names = recipe.synthesis, data.class_names
    ipc, seed, classes = synthesis.ipc, recipe.seed, data.num_classes
    if synthesis.init == "mosaic":
        assert synthesis.mosaic is not None
        return mosaics(
            data.train, teacher, ipc, synthesis.mosaic, num_classes=classes, seed=seed, device=device, class_names=names
        )
    assert synthesis.init in ("real_median", "real_kmeans")
    rule: Rule = "real_median" if synthesis.init == "real_median" else "real_kmeans"
    rows = choose_rows(
        data.train,
        teacher,
        ipc,
        rule,
        num_classes=classes,
        seed=seed,
        class_names=names,
        device=device,
        easiest=synthesis.easiest,
    )
    return data.train.images(rows)


def check_candidates(recipe: Recipe, data: SourceData) -> None:
    """Find out, before any work, whether each class has enough images for the mosaics of a recipe.

    Raises:
        DataError: A class has too few.
    """
    settings = recipe.synthesis.mosaic
    if settings is not None:
        for name, rows in zip(data.class_names, data.train.rows_by_class(data.num_classes), strict=True):
            _check_candidates(name, min(len(rows), settings.candidates), recipe.synthesis.ipc, settings)


def choose_rows(
    split: ImageSplit,
    teacher: Teacher,
    ipc: int,
    rule: Rule,
    *,
    num_classes: int,
    seed: int,
    class_names: Sequence[str],
    device: torch.device,
    easiest: float = 1.0,
) -> np.ndarray:
    """Which `ipc` real images per class to take, (K * ipc,) int64 row numbers, class-major, none twice.

    Args:
        split: The training images.
        teacher: The logit teacher.
        ipc: Images per class.
        rule: `real_median` (DELT, arXiv 2411.19946): those whose cross-entropy at the teacher is nearest to the median of
            the class, nearest first. `real_kmeans`: the class is cut into `ipc` clusters of the teacher's penultimate
            features, the largest first; of each the image nearest to its centre that is not taken yet. Ties go by row.
        num_classes: K.
        seed: Of the k-means; `real_median` draws nothing.
        class_names: K names, for errors.
        device: Where the teacher is.
        easiest: For `real_kmeans`: only this share of each class, that of the lowest loss at the teacher, and at least
            `ipc` images. What a teacher is unsure of is often mislabelled or of a look of its own.

    Raises:
        DataError: A class has fewer than `ipc` images.
        TeacherError: `real_kmeans` with a teacher that has no linear layer.
    """
    by_class = split.rows_by_class(num_classes)
    for name, rows in zip(class_names, by_class, strict=True):
        check_class_size(name, len(rows), ipc)
    chosen = []
    for label, rows in enumerate(by_class):
        if rule == "real_median":
            picked = _nearest_to_median(_losses(split, rows, teacher, label, device), ipc)
        else:
            if easiest < 1:
                count = max(ipc, math.ceil(easiest * len(rows)))
                rows = np.sort(rows[np.argsort(_losses(split, rows, teacher, label, device), kind="stable")[:count]])
            features = _features(split, rows, teacher, device)
            picked = nearest_to_centres(features, ipc, seed=derived_seed(seed, "k-means", label) % 2**32)
        chosen.append(rows[picked])
    return np.concatenate(chosen)


def _nearest_to_median(losses: np.ndarray, count: int) -> np.ndarray:
    distance = np.abs(losses - np.median(losses))
    return np.argsort(distance, kind="stable")[:count]


def nearest_to_centres(features: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """One row near each of `count` k-means centres, none twice; rows of large clusters first.

    Args:
        features: (N, D) float64, N at least `count`.
        count: Clusters; one is the mean of all.
        seed: Of the k-means, below 2^32.

    Returns:
        (count,) int64.
    """
    with threadpool_limits(1):  # the sums of several threads are added up as they come
        found = KMeans(count, n_init=4, random_state=seed).fit(features)
        distance = np.stack([np.square(features - centre).sum(1) for centre in found.cluster_centers_])
    sizes = np.bincount(found.labels_, minlength=count)
    chosen: list[int] = []
    for number in np.lexsort((distance.argmin(1), -sizes)):
        distance[number, chosen] = np.inf
        chosen.append(int(distance[number].argmin()))
    return np.array(chosen, dtype=np.int64)


def _features(split: ImageSplit, rows: np.ndarray, teacher: Teacher, device: torch.device) -> np.ndarray:
    """Penultimate features of some images, (N, D) float64."""
    parts = []

    def images(part: range) -> Tensor:
        return split.images(rows[part.start : part.stop])

    for _, features in penultimate_features(teacher, images, len(rows), device=device, batch_size=_BATCH):
        raise_if_stopped()
        parts.append(features.double().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def _losses(split: ImageSplit, rows: np.ndarray, teacher: Teacher, label: int, device: torch.device) -> np.ndarray:
    """Cross-entropy of some images of a class at a teacher, (N,) float64."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        raise_if_stopped()
        images = to_reference(split.images(rows[start : start + _BATCH]).to(device))
        parts.append(_cross_entropy(teacher, images, label))
    return torch.cat(parts).double().numpy()


def _cross_entropy(teacher: Teacher, images: Tensor, label: int) -> Tensor:
    """Images in the reference normalisation, (B, C, S, S) -> (B,) float32 on the CPU."""
    logits = teacher.logits(images).float()
    return F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device), reduction="none").cpu()


def mosaics(
    split: ImageSplit,
    teacher: Teacher,
    ipc: int,
    settings: Mosaic,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    class_names: Sequence[str],
) -> Tensor:
    """Images put together from patches that the teacher knows best (RDED, arXiv 2312.03526), (K * ipc, C, S, S) uint8.

    Of each class `candidates` images are drawn, of each of them the crop of least cross-entropy is kept, and the best
    grid * grid * ipc crops are put together: slot `s` has the ranks from s * grid * grid on, row by row of its grid, so
    that slot 0 is what the teacher knows best. Ties go by row number, then by draw.

    Args:
        split: The training images.
        teacher: The logit teacher, which sees each crop at the full working size.
        ipc: Images per class.
        settings: Candidates, crops, grid.
        num_classes: K.
        seed: Of candidates and crops.
        device: Where the teacher is.
        class_names: K names, for errors.

    Raises:
        DataError: A class has too few images.
    """
    by_class = split.rows_by_class(num_classes)
    for name, rows in zip(class_names, by_class, strict=True):
        _check_candidates(name, min(len(rows), settings.candidates), ipc, settings)
    parts: list[Tensor] = []
    for label, rows in enumerate(by_class):
        generator = torch.Generator().manual_seed(derived_seed(seed, "mosaic", label))
        drawn = torch.randperm(len(rows), generator=generator)[: settings.candidates].sort().values
        crops = draw_crop(len(drawn) * settings.crops, split.size, settings.crop_scale, generator)
        crops = crops.view(len(drawn), settings.crops, 4)
        ranked = _best_crops(split, rows[drawn.numpy()], crops, teacher, label, device)
        parts += _put_together(split, ranked, ipc, settings.grid)
    return torch.stack(parts)


def _check_candidates(name: str, count: int, ipc: int, settings: Mosaic) -> None:
    needed = settings.grid**2 * ipc
    if count < needed:
        few = f"synthesis.mosaic.candidates is {count}" if count == settings.candidates else f"there are {count} images"
        remedy = "raise it, or lower" if count == settings.candidates else "lower"
        raise DataError(
            f"class {name!r} needs {needed} candidates for {ipc} mosaics of {settings.grid} x {settings.grid} patches, but "
            f"{few}; {remedy} synthesis.ipc or synthesis.mosaic.grid"
        )


@torch.no_grad()
def _best_crops(
    split: ImageSplit, rows: np.ndarray, crops: Tensor, teacher: Teacher, label: int, device: torch.device
) -> list[tuple[int, Tensor]]:
    """The crop of least loss of each image, (row, (4,) box), least loss first.

    Args:
        split: The images.
        rows: (N,).
        crops: (N, crops, 4) int64.
        teacher: Who sees them.
        label: Their class.
        device: Where the teacher is.
    """
    count = crops.shape[1]
    losses = []
    for part in batch_ranges(len(rows), max(1, _BATCH // count)):
        raise_if_stopped()
        images = to_reference(split.images(rows[part.start : part.stop]).to(device)).repeat_interleave(count, dim=0)
        shown = resample(images, crops[part.start : part.stop].flatten(0, 1), torch.zeros(1, dtype=torch.bool))
        losses.append(_cross_entropy(teacher, shown, label).view(-1, count))
    found = torch.cat(losses).numpy()
    best = found.argmin(axis=1)  # the first of several; torch's own choice is open
    order = found.min(axis=1).argsort(kind="stable")
    return [(int(rows[i]), crops[i, best[i]]) for i in order]


def _put_together(split: ImageSplit, ranked: Sequence[tuple[int, Tensor]], ipc: int, grid: int) -> Iterator[Tensor]:
    """Mosaics of a class, each (C, S, S) uint8; a side that the grid does not divide has patches of two sizes."""
    size = split.size
    cuts = [size * number // grid for number in range(grid + 1)]
    for slot in range(ipc):
        patches = iter(ranked[slot * grid * grid : (slot + 1) * grid * grid])
        canvas = torch.empty(split.channels, size, size, dtype=torch.uint8)
        for (top, bottom), (left, right) in ((y, x) for y in pairwise(cuts) for x in pairwise(cuts)):
            row, box = next(patches)
            canvas[:, top:bottom, left:right] = _patch(split.images([row]), box, bottom - top, right - left)
        yield canvas


def _patch(image_uint8: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """A crop of one image, (1, C, S, S), at another size, straight from its pixels: (C, height, width) uint8."""
    size, box = image_uint8.shape[-1], box.view(1, 4)
    rows = axis_matrix(box[:, 0], box[:, 2], size, height)
    columns = axis_matrix(box[:, 1], box[:, 3], size, width)
    return to_uint8(rows.unsqueeze(1) @ to_reference(image_uint8) @ columns.mT.unsqueeze(1))[0]
