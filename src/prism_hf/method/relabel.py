"""Relabel: views of the shipped images are drawn, recorded and labeled by the teachers, batch by batch.

Legend: T teachers, B images of a batch, K classes, C channels, H W pixels.

Labels are computed on the decoded bytes that ship. The published code labels 8-bit JPEGs that are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import TeacherError
from ..images import apply_views, draw_views, to_columns, to_reference
from ..models import Teacher
from ..recipe import RelabelRecipe, batch_ranges
from ..runtime import derived_seed


def combine_logits(logits: Tensor, rule: str, weights: Sequence[float] | None = None) -> Tensor:
    """Combine the logits of several teachers into one label.

    Args:
        logits: Raw logits of one batch, (T, B, K), float.
        rule: `mean`; `norm_balanced_mean` (G-VBSM, arXiv 2311.17950, as PRISM uses it): each teacher's (B, K) matrix is
            rescaled to the mean Frobenius norm over the teachers, then averaged; `weighted`.
        weights: One per teacher, for `weighted`; divided by their sum.

    Returns:
        (B, K), dtype of `logits`.

    Raises:
        TeacherError: `norm_balanced_mean`, and a teacher answers all zeros.
    """
    match rule:
        case "mean":
            return logits.mean(0)
        case "norm_balanced_mean":
            norms = logits.flatten(1).norm(dim=1)
            if not bool((norms > 0).all()):
                raise TeacherError("a teacher answers all zeros, so its norm cannot be balanced; use ensemble mean")
            return (logits * (norms.mean() / norms).view(-1, 1, 1)).mean(0)
        case "weighted":
            assert weights is not None
            share = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
            return torch.einsum("t,tbk->bk", share / share.sum(), logits)
    raise ValueError(f"unknown ensemble rule {rule!r}")


@torch.no_grad()
def ask_teachers(images: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe) -> Tensor:
    """Return the combined raw logits of a batch: reference normalization (B, C, H, W) -> (B, K) float16 on the CPU.

    Raises:
        TeacherError: A logit does not fit into float16.
    """
    logits = torch.stack([teacher.logits(images).float() for teacher in teachers])
    label = combine_logits(logits, settings.ensemble, settings.weights).half().cpu()
    if not bool(label.isfinite().all()):
        raise TeacherError(
            f"teachers {', '.join(t.name for t in teachers)} answer with logits beyond float16 (65504) or not finite; "
            "they cannot label these images"
        )
    return label


def relabel_batches(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Draw and label one view of every image: one epoch of the views table, batch by batch.

    Args:
        epoch: Seeds the draws, together with `seed`; epochs are independent of each other.
        images_uint8: All images, decoded, (N, C, H, W); those of a batch go to the teachers' device.
        teachers: Who labels, in the order of the weights.
        settings: Views, batch size, ensemble rule.
        seed: The recipe's seed.

    Yields:
        Columns of B rows in training order: `epoch` and `batch` int32, those of `views.to_columns`, and
        `teacher_logits` (B, K) float16.
    """
    device = teachers[0].device
    generator = torch.Generator().manual_seed(derived_seed(seed, "relabel", epoch))
    order = torch.randperm(len(images_uint8), generator=generator)
    for number, part in enumerate(batch_ranges(len(order), settings.batch_size)):
        rows = order[part.start : part.stop]
        view = draw_views(
            len(rows),
            images_uint8.shape[-1],
            generator,
            crop_scale=settings.view.crop_scale,
            flip=settings.view.flip,
            mix=settings.view.mix,
            mix_alpha=settings.view.mix_alpha,
        )
        shown = apply_views(to_reference(images_uint8[rows].to(device)), view)
        columns = {"epoch": np.full(len(rows), epoch, np.int32), "batch": np.full(len(rows), number, np.int32)}
        columns |= to_columns(view, rows)
        columns["teacher_logits"] = ask_teachers(shown, teachers, settings).numpy()
        yield columns


def relabel_epoch(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> dict[str, np.ndarray]:
    """Return all batches of `relabel_batches` as one table of N rows."""
    batches = list(relabel_batches(epoch, images_uint8, teachers, settings, seed=seed))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def label_images(images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe) -> Iterator[Tensor]:
    """Label the images themselves, without a view: parts (B, K) float16 in table order, in batches of the recipe."""
    for part in batch_ranges(len(images_uint8), settings.batch_size):
        batch = images_uint8[part.start : part.stop].to(teachers[0].device)
        yield ask_teachers(to_reference(batch), teachers, settings)
