"""Start images: the real image, or mosaic of real patches, from which each slot starts.

Legend: N images of a class, B images of a batch, C channels, S side of the working image, D features, K classes.

Classes are processed one at a time, so memory holds the losses or features of only one class. The result does not depend on
the number of processes. It depends on the number of threads only through the teacher's own computation.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..errors import DataError
from ..images import ImageSplit, SourceData, axis_matrix, draw_crop, resample, to_reference, to_uint8
from ..models import Teacher, penultimate_features
from ..recipe import SynthesisRecipe, batch_ranges
from ..runtime import derived_seed

_BATCH = 256  # images per forward pass of a teacher


def real_rows(data: SourceData, ipc: int, *, seed: int, by_index: bool = False) -> np.ndarray:
    """Choose `ipc` real training images per class without a teacher, (K * ipc,) int64 row numbers, class-major.

    Init `real_random` draws without replacement. The random-real control uses the same images, so the table compares images
    before and after optimization. Init `real_index` takes the first images of each class (`by_index`).

    Raises:
        DataError: A class has fewer than `ipc` images.
    """
    chosen = []
    for label, rows in enumerate(_classes(data, ipc)):
        if not by_index:
            generator = torch.Generator().manual_seed(derived_seed(seed, "real images", label))
            rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        chosen.append(rows[:ipc])
    return np.concatenate(chosen)


def choose_start_images(data: SourceData, teacher: Teacher, settings: SynthesisRecipe, *, seed: int) -> Tensor:
    """Return the start images that the logit teacher chooses: (K * ipc, C, S, S) uint8, class-major.

    Raises:
        DataError: A class has too few images.
        TeacherError: The init is `real_kmeans`, and the teacher has no linear layer.
    """
    if settings.init == "mosaic":
        return mosaics(data, teacher, settings, seed=seed)
    return data.train.images(choose_rows(data, teacher, settings, seed=seed))


def choose_rows(data: SourceData, teacher: Teacher, settings: SynthesisRecipe, *, seed: int) -> np.ndarray:
    """Choose `ipc` distinct real images per class with the logit teacher, (K * ipc,) int64 row numbers, class-major.

    `real_median` (DELT, arXiv 2411.19946) takes the images whose cross-entropy under the teacher is closest to the class
    median, closest first. `real_kmeans` runs k-means with `ipc` clusters on the teacher's penultimate features of a class.
    From each cluster, largest first, it takes the unused image closest to the center. Ties are broken by row number.

    `easiest` below 1 leaves only this share of each class (at least `ipc` images): those with the lowest loss under the
    teacher. Images that a teacher is unsure of are often mislabeled or atypical of their class. From them, `real_kmeans`
    chooses as before, and `real_random` draws without replacement.
    """
    ipc, chosen = settings.ipc, []
    for label, rows in enumerate(_classes(data, ipc)):
        if settings.init == "real_median":
            losses = _losses(data.train, rows, teacher, label)
            picked = np.argsort(np.abs(losses - np.median(losses)), kind="stable")[:ipc]
        else:
            if settings.easiest < 1:
                losses = _losses(data.train, rows, teacher, label)
                count = max(ipc, math.ceil(settings.easiest * len(rows)))
                rows = np.sort(rows[np.argsort(losses, kind="stable")[:count]])
            if settings.init == "real_random":
                generator = torch.Generator().manual_seed(derived_seed(seed, "easy images", label))
                picked = torch.randperm(len(rows), generator=generator).numpy()[:ipc]
            else:
                features = _features(data.train, rows, teacher)
                picked = nearest_to_centers(features, ipc, seed=derived_seed(seed, "k-means", label) % 2**32)
        chosen.append(rows[picked])
    return np.concatenate(chosen)


def _classes(data: SourceData, ipc: int) -> list[np.ndarray]:
    """Return the rows of each class in ascending order; raise a `DataError` if a class has fewer than `ipc` images."""
    by_class = data.train.rows_by_class(data.distilled_classes)
    for name, rows in zip(data.class_names, by_class, strict=False):
        if len(rows) < ipc:
            raise DataError(
                f"class {name!r} has {len(rows)} training images, but ipc is {ipc}; lower ipc (init noise needs no real "
                "images)"
            )
    return by_class


def nearest_to_centers(features: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Choose a distinct row near each of `count` k-means centers, in descending order of cluster size.

    `features` is (N, D) float64 with N >= `count`; the result is (count,) int64. `seed` must be below 2^32.
    """
    with threadpool_limits(1):  # with several threads, the order of summation varies
        fitted = KMeans(count, n_init=4, random_state=seed).fit(features)
        distance = np.stack([np.square(features - center).sum(1) for center in fitted.cluster_centers_])
    sizes = np.bincount(fitted.labels_, minlength=count)
    chosen: list[int] = []
    for number in np.lexsort((distance.argmin(1), -sizes)):
        distance[number, chosen] = np.inf
        chosen.append(int(distance[number].argmin()))
    return np.array(chosen, dtype=np.int64)


def _features(split: ImageSplit, rows: np.ndarray, teacher: Teacher) -> np.ndarray:
    """Return the penultimate features of the given rows, (N, D) float64."""
    parts = penultimate_features(teacher, lambda part: split.images(rows[part]), len(rows), batch_size=_BATCH)
    return np.concatenate([features.double().numpy() for _, features in parts])


@torch.no_grad()
def _losses(split: ImageSplit, rows: np.ndarray, teacher: Teacher, label: int) -> np.ndarray:
    """Return the cross-entropy under a teacher of the given rows of a class, (N,) float64."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        images = to_reference(split.images(rows[start : start + _BATCH]).to(teacher.device))
        parts.append(_cross_entropy(teacher, images, label))
    return torch.cat(parts).double().numpy()


def _cross_entropy(teacher: Teacher, images: Tensor, label: int) -> Tensor:
    """Return the cross-entropy per image: reference normalization (B, C, S, S) -> (B,) float32 on the CPU."""
    logits = teacher.logits(images).float()
    return F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device), reduction="none").cpu()


def mosaics(data: SourceData, teacher: Teacher, settings: SynthesisRecipe, *, seed: int) -> Tensor:
    """Assemble mosaics from the real patches with the lowest loss (RDED, arXiv 2312.03526), (K * ipc, C, S, S) uint8.

    For each class, `candidates` images are drawn. From each image, the crop with the lowest cross-entropy is kept; the
    teacher sees it at the full working size. The best grid * grid * ipc crops form the mosaics: slot `s` takes the ranks
    from s * grid * grid on and fills its grid row by row, so slot 0 has the lowest losses. Ties are broken by row number,
    then by order of draw. With `easiest`, the patches are drawn at random from this share of the candidates instead.
    """
    mosaic, split = settings.mosaic, data.train
    assert mosaic is not None
    check_candidates(data, settings)
    images: list[Tensor] = []
    for label, rows in enumerate(split.rows_by_class(data.distilled_classes)):
        generator = torch.Generator().manual_seed(derived_seed(seed, "mosaic", label))
        drawn = torch.randperm(len(rows), generator=generator)[: mosaic.candidates].sort().values
        crops = draw_crop(len(drawn) * mosaic.crops, split.size, mosaic.crop_scale, generator)
        crops = crops.view(len(drawn), mosaic.crops, 4)
        ranked = _best_crops(split, rows[drawn.numpy()], crops, teacher, label)
        if mosaic.easiest is not None:
            easy = max(mosaic.grid**2 * settings.ipc, math.ceil(mosaic.easiest * len(ranked)))
            ranked = [ranked[i] for i in torch.randperm(easy, generator=generator).tolist()]
        images += _assemble(split, ranked, settings.ipc, mosaic.grid)
    return torch.stack(images)


def check_candidates(data: SourceData, settings: SynthesisRecipe) -> None:
    """Raise a `DataError` before any work is done if a class has too few images for the mosaics of a recipe."""
    mosaic, ipc = settings.mosaic, settings.ipc
    if mosaic is None:
        return
    needed = mosaic.grid**2 * ipc
    for name, rows in zip(data.class_names, data.train.rows_by_class(data.distilled_classes), strict=False):
        shortage = f"it has only {len(rows)} images; lower"
        if len(rows) >= mosaic.candidates:
            shortage = f"synthesis.mosaic.candidates is {mosaic.candidates}; raise it, or lower"
        if min(len(rows), mosaic.candidates) < needed:
            raise DataError(
                f"class {name!r} needs {needed} candidates for {ipc} mosaics of {mosaic.grid} x {mosaic.grid} patches, but "
                f"{shortage} synthesis.ipc or synthesis.mosaic.grid"
            )


@torch.no_grad()
def _best_crops(
    split: ImageSplit, rows: np.ndarray, crops: Tensor, teacher: Teacher, label: int
) -> list[tuple[int, Tensor]]:
    """Return the best of the (N, crops, 4) crops of each image of a class: (row, (4,) box) pairs, lowest loss first."""
    count = crops.shape[1]
    parts = []
    for part in batch_ranges(len(rows), max(1, _BATCH // count)):
        images = to_reference(split.images(rows[part.start : part.stop]).to(teacher.device))
        images = images.repeat_interleave(count, dim=0)
        cropped = resample(images, crops[part.start : part.stop].flatten(0, 1), torch.zeros(1, dtype=torch.bool))
        parts.append(_cross_entropy(teacher, cropped, label).view(-1, count))
    losses = torch.cat(parts).numpy()
    best = losses.argmin(axis=1)  # NumPy returns the first minimum; torch does not specify which
    order = losses.min(axis=1).argsort(kind="stable")
    return [(int(rows[i]), crops[i, best[i]]) for i in order]


def _assemble(split: ImageSplit, ranked: Sequence[tuple[int, Tensor]], ipc: int, grid: int) -> Iterator[Tensor]:
    """Yield the mosaics of a class, (C, S, S) uint8 each; if the grid does not divide S, there are two patch sizes."""
    size = split.size
    cuts = list(pairwise(size * number // grid for number in range(grid + 1)))
    patches = iter(ranked)
    for _ in range(ipc):
        canvas = torch.empty(split.channels, size, size, dtype=torch.uint8)
        for (top, bottom), (left, right) in product(cuts, cuts):
            row, box = next(patches)
            # Resample the crop directly from the image to the size of its patch.
            rows, columns = axis_matrix(box[0], box[2], size, bottom - top), axis_matrix(box[1], box[3], size, right - left)
            pixels = rows.unsqueeze(1) @ to_reference(split.images([row])) @ columns.mT.unsqueeze(1)
            canvas[:, top:bottom, left:right] = to_uint8(pixels)[0]
        yield canvas
