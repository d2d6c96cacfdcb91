"""Relabel: draw views of the shipped images, record them, and label them with the teachers, batch by batch.

Legend: T teachers, B images of a batch, K classes, C channels, H W pixels.

Labels are computed on the decoded pixels of the shipped files. The published code labels 8-bit JPEGs and discards them.
"""

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
    """Combine the raw logits of several teachers into one soft label: (T, B, K) float -> (B, K) of the same dtype.

    `norm_balanced_mean` (G-VBSM, arXiv 2311.17950, as used by PRISM) rescales each teacher's (B, K) matrix to the mean
    Frobenius norm over all teachers, then averages. `weighted` takes one weight per teacher, divided by the sum of weights.

    Raises:
        TeacherError: The rule is `norm_balanced_mean`, and all logits of a teacher are zero.
    """
    match rule:
        case "mean":
            return logits.mean(0)
        case "norm_balanced_mean":
            norms = logits.flatten(1).norm(dim=1)
            if not bool((norms > 0).all()):
                raise TeacherError("all logits of a teacher are zero, so its norm cannot be balanced; use ensemble mean")
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
        TeacherError: A logit is not finite, or does not fit into float16.
    """
    logits = torch.stack([teacher.logits(images).float() for teacher in teachers])
    label = combine_logits(logits, settings.ensemble, settings.weights).half().cpu()
    if not bool(label.isfinite().all()):
        raise TeacherError(
            f"teachers {', '.join(t.name for t in teachers)} return logits that exceed float16 (65504) or are not finite; "
            "they cannot label these images"
        )
    return label


def relabel_batches(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Draw and label one view of every image, (N, C, H, W): one epoch of the views table, batch by batch.

    The random draws depend only on `epoch` and the recipe's `seed`, so epochs are independent of each other.

    Yields:
        Columns of B rows in training order: `epoch` and `batch` int32, the columns of `views.to_columns`, and
        `teacher_logits` (B, K) float16.
    """
    device, size, rule = teachers[0].device, images_uint8.shape[-1], settings.view
    generator = torch.Generator().manual_seed(derived_seed(seed, "relabel", epoch))
    order = torch.randperm(len(images_uint8), generator=generator)
    for number, part in enumerate(batch_ranges(len(order), settings.batch_size)):
        rows = order[part.start : part.stop]
        view = draw_views(
            len(rows), size, generator, crop_scale=rule.crop_scale, flip=rule.flip, mix=rule.mix, mix_alpha=rule.mix_alpha
        )
        augmented = apply_views(to_reference(images_uint8[rows].to(device)), view)
        columns = {"epoch": np.full(len(rows), epoch, np.int32), "batch": np.full(len(rows), number, np.int32)}
        columns |= to_columns(view, rows)
        columns["teacher_logits"] = ask_teachers(augmented, teachers, settings).numpy()
        yield columns


def relabel_epoch(
    epoch: int, images_uint8: Tensor, teachers: Sequence[Teacher], settings: RelabelRecipe, *, seed: int
) -> dict[str, np.ndarray]:
    """Return all batches of `relabel_batches` as one table of N rows."""
    batches = list(relabel_batches(epoch, images_uint8, teachers, settings, seed=seed))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
