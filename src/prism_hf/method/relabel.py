"""Relabel: draw views of the shipped images, record them, and label them with the teachers, batch by batch.

Legend: T teachers, B images of a batch, K classes, C channels, H W pixels.

Labels are computed on the decoded pixels of the shipped files. The published code labels 8-bit JPEGs and discards them.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import TeacherError
from ..images import View, apply_views, draw_views, to_columns, to_reference
from ..models import Teacher
from ..recipe import RelabelRecipe, batch_ranges
from ..runtime import derived_seed, to_device


def combine_logits(logits: Tensor, rule: str, weights: Sequence[float] | None = None) -> Tensor:
    """Combine the raw logits of several teachers into one soft label: (T, B, K) float -> (B, K) of the same dtype.

    `norm_balanced_mean` (G-VBSM, arXiv 2311.17950, as used by PRISM) rescales each teacher's (B, K) matrix to the mean
    Frobenius norm over all teachers, then averages. `weighted` takes one weight per teacher, divided by the sum of weights.
    If all logits of a teacher are zero, its norm cannot be balanced, and the result is NaN.
    """
    match rule:
        case "mean":
            return logits.mean(0)
        case "norm_balanced_mean":
            norms = logits.flatten(1).norm(dim=1)
            return (logits * (norms.mean() / norms).view(-1, 1, 1)).mean(0)
        case "weighted":
            assert weights is not None
            share = to_device(torch.tensor(weights, dtype=logits.dtype), logits.device)
            return torch.einsum("t,tbk->bk", share / share.sum(), logits)
    raise ValueError(f"unknown ensemble rule {rule!r}")


def ask_teachers(images: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe) -> Tensor:
    """Return the combined raw logits of a batch: reference normalization (B, C, H, W) -> (B, K) float16 on the CPU.

    Raises:
        TeacherError: A logit is not finite, or does not fit into float16.
    """
    return _checked(_labels(images, teachers, settings), teachers)


@torch.no_grad()
def _labels(images: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe) -> Tensor:
    """Return the result of `ask_teachers` on the device, without waiting for it."""
    logits = torch.stack([teacher.logits(images).float() for teacher in teachers])
    return combine_logits(logits, settings.ensemble, settings.weights).half()


def _checked(labels: Tensor, teachers: Sequence[Teacher]) -> Tensor:
    """Return labels on the CPU, after waiting for them, or raise a `TeacherError`."""
    labels = labels.cpu()
    if not bool(labels.isfinite().all()):
        raise TeacherError(
            f"teachers {', '.join(t.name for t in teachers)} return logits that exceed float16 (65504), are not finite, or "
            "are all zero; they cannot label these images (if the logits of one are all zero, use ensemble mean)"
        )
    return labels


def relabel_batches(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Draw and label one view of every image, (N, C, H, W): one epoch of the views table, batch by batch.

    The random draws depend only on `epoch` and the recipe's `seed`, so epochs are independent of each other.

    Yields:
        Columns of B rows in training order: `epoch` and `batch` int32, the columns of `views.to_columns`, and
        `teacher_logits` (B, K) float16.
    """
    last = None
    for columns, labels in _asked(epoch, images_uint8, teachers, settings, seed):
        # A batch is given away when the next one is on its way, so that a GPU labels while its caller writes.
        if last is not None:
            yield last[0] | {"teacher_logits": _checked(last[1], teachers).numpy()}
        last = columns, labels
    assert last is not None
    yield last[0] | {"teacher_logits": _checked(last[1], teachers).numpy()}


def _asked(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], Tensor]]:
    """Yield the other columns and the labels on the device, batch by batch, without waiting for the device."""
    device = teachers[0].device
    for columns, rows, view in drawn_batches(epoch, len(images_uint8), images_uint8.shape[-1], settings, seed=seed):
        augmented = apply_views(to_reference(to_device(images_uint8[rows], device)), view)
        yield columns, _labels(augmented, teachers, settings)


def drawn_batches(
    epoch: int, count: int, size: int, settings: RelabelRecipe, *, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, View]]:
    """Draw one view of each of `count` square images of side `size`; yield columns, image rows and views of each batch.

    The columns are those of `relabel_batches` without the logits.
    """
    rule = settings.view
    generator = torch.Generator().manual_seed(derived_seed(seed, "relabel", epoch))
    order = torch.randperm(count, generator=generator)
    for number, part in enumerate(batch_ranges(len(order), settings.batch_size)):
        rows = order[part.start : part.stop]
        view = draw_views(
            len(rows),
            size,
            generator,
            crop_scale=rule.crop_scale,
            flip=rule.flip,
            mix=rule.mix,
            mix_alpha=rule.mix_alpha,
            cells=rule.cell or 1,
        )
        columns = {"epoch": np.full(len(rows), epoch, np.int32), "batch": np.full(len(rows), number, np.int32)}
        yield columns | to_columns(view, rows), rows, view


def relabel_epoch(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> dict[str, np.ndarray]:
    """Return all batches of `relabel_batches` as one table of N rows."""
    return joined(relabel_batches(epoch, images_uint8, teachers, settings, seed=seed))


def joined(batches: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the columns of batches of views as one table."""
    parts = list(batches)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
