"""Data densification: a regularizer that makes the images of a class span more directions.

Legend: B images, C channels, H W pixels.

Source: G-VBSM (arXiv 2311.17950), data densification. X_y holds the pooled images of class y, one per row, and l_y are
the eigenvalues of the Gram matrix X_y X_y^T. The first softmax is the target, so no gradient flows through it:

    D(x, y) = sum_y KL( softmax(l_y / temperature) || softmax(l_y) )
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def densification(images: Tensor, labels: Tensor, *, temperature: float = 4.0, size: int = 32) -> Tensor:
    """Return the densification loss D, a scalar: how unevenly the images of each class span their directions.

    Args:
        images: (B, C, H, W), any float dtype; the loss is computed in at least float32, even under autocast.
        labels: (B,) int64. A class with fewer than two images contributes 0 and no gradient.
        temperature: Temperature of the target; above 1, the target is flatter than the current spectrum.
        size: Side to which images are first average-pooled; smaller images are enlarged, as published.
    """
    pooled = F.adaptive_avg_pool2d(images.to(torch.promote_types(images.dtype, torch.float32)), size).flatten(1)
    total = pooled[:0].sum()
    for label in dict.fromkeys(labels.tolist()):
        class_images = pooled[labels == label]
        if len(class_images) > 1:
            total = total + _sharpness(class_images, temperature)
    return total


def _sharpness(x: Tensor, temperature: float) -> Tensor:
    """Return the KL term of one class; x is (images, pixels)."""
    # Half precision would lose the small eigenvalues next to the largest.
    with torch.autocast(x.device.type, enabled=False):
        eigenvalues = torch.linalg.eigvalsh(x @ x.T)
    target = (eigenvalues.detach() / temperature).log_softmax(0)
    return F.kl_div(eigenvalues.log_softmax(0), target, reduction="sum", log_target=True)
