"""Densification: the images of a class shall span more directions, as a term of the loss.

Legend: B images, C channels, H W pixels.

Source: G-VBSM (arXiv 2311.17950), data densification. With X_y the pooled images of class y, one per row, and l_y the
eigenvalues of X_y X_y^T:

    D(x, y) = sum_y KL( softmax(l_y / temperature), held fixed || softmax(l_y) )
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def densification(images: Tensor, labels: Tensor, *, temperature: float = 4.0, size: int = 32) -> Tensor:
    """Measure how far the images of each class are from spanning their directions evenly: D, a scalar.

    Args:
        images: (B, C, H, W), any float dtype; calculated in float32 at least, under autocast too.
        labels: (B,) int64. A class with fewer than two images has no directions to compare: it gives 0, and no gradient.
        temperature: Of the target; above 1 it is flatter than what is there.
        size: Side that images are average-pooled to first; smaller ones are pooled up, as published.
    """
    pooled = F.adaptive_avg_pool2d(images.to(torch.promote_types(images.dtype, torch.float32)), size).flatten(1)
    total = pooled[:0].sum()
    for label in dict.fromkeys(labels.tolist()):
        own = pooled[labels == label]
        if len(own) > 1:
            total = total + _sharpness(own, temperature)
    return total


def _sharpness(x: Tensor, temperature: float) -> Tensor:
    """KL of one class; x is (images, pixels)."""
    # Half precision would lose the small eigenvalues beside the largest.
    with torch.autocast(x.device.type, enabled=False):
        eigenvalues = torch.linalg.eigvalsh(x @ x.T)
    target = (eigenvalues.detach() / temperature).log_softmax(0)
    return F.kl_div(eigenvalues.log_softmax(0), target, reduction="sum", log_target=True)
