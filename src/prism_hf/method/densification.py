"""Densification: the images of a class shall span more directions, as a term of the loss.

Legend: B images, C channels, H W pixels.

Source: G-VBSM (arXiv 2311.17950), data densification. With X_y the pooled images of class y, one per row, and l_y the
eigenvalues of X_y X_y^T:

    D(x, y) = sum_y KL( softmax(l_y / temperature), held fixed || softmax(l_y) )
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def densification(images: Tensor, labels: Tensor, *, temperature: float = 4.0, size: int = 32) -> Tensor:
    """Measure how far the images of each class are from spanning their directions evenly.

    Args:
        images: (B, C, H, W), any float dtype; calculated in float32 at least, under autocast too.
        labels: (B,) int64. A class with fewer than two images in the batch has no directions to compare, and gives 0.
        temperature: Of the target; above 1 it is flatter than what is there.
        size: Side that images are average-pooled to first; smaller ones are pooled up, as published.

    Returns:
        Scalar: the sum over the classes. Without a class of two it is 0, with a gradient of 0.

    Source: G-VBSM (arXiv 2311.17950), data densification.
    """
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    pooled = F.adaptive_avg_pool2d(wide, size).flatten(1)
    total = pooled[:0].sum()
    for rows in _rows_by_class(labels):
        if len(rows) > 1:
            total = total + _sharpness(pooled[rows], temperature)
    return total


def _rows_by_class(labels: Tensor) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        rows.setdefault(label, []).append(row)
    return list(rows.values())


def _sharpness(x: Tensor, temperature: float) -> Tensor:
    """KL of one class; x is (images, pixels)."""
    # Half precision would lose the small eigenvalues beside the largest.
    with torch.autocast(x.device.type, enabled=False):
        eigenvalues = torch.linalg.eigvalsh(x @ x.T)
    target = (eigenvalues.detach() / temperature).log_softmax(0)
    return F.kl_div(eigenvalues.log_softmax(0), target, reduction="sum", log_target=True)
