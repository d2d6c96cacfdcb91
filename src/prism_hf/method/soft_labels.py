"""Soft labels: losses for training a student on stored teacher logits.

Legend: B views of a batch, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe import EvaluationRecipe

HALD_SMOOTHING = 0.8
"""Label smoothing of hard labels between soft ones, as published for HALD."""


def soft_label_loss(logits: Tensor, teacher_logits: Tensor, class_shares: Tensor, settings: EvaluationRecipe) -> Tensor:
    """Return the loss of a student on stored teacher logits, a scalar.

    Args:
        logits: Logits of the student, (B, K).
        teacher_logits: Stored raw logits of the same views, (B, K).
        class_shares: Share of each class in each view, (B, K); rows sum to 1.
        settings: `mse_ce` (G-VBSM, PRISM): mean squared error of the logits + ce_weight * CE; unlike in the published code,
            CE includes the mix partner. `kl` (SRe2L; arXiv 1503.02531): KL(teacher || student) at the temperature, times
            the squared temperature, so that a high temperature does not make the gradient vanish. `dist` (DIST, arXiv
            2205.10536): for probabilities at the temperature, (1 - mean correlation of the rows, the classes of an image)
            + (1 - mean correlation of the columns, the images of a class), times the squared temperature. `cosine` (GIFT,
            arXiv 2405.14736): 1 - mean cosine similarity of the logits, centered over the classes, + ce_weight * CE.
    """
    t = settings.temperature
    if settings.loss == "kl":
        target, guess = F.log_softmax(teacher_logits / t, dim=1), F.log_softmax(logits / t, dim=1)
        return F.kl_div(guess, target, reduction="batchmean", log_target=True) * t * t
    if settings.loss == "dist":
        guess, target = F.softmax(logits / t, dim=1), F.softmax(teacher_logits / t, dim=1)
        mean_correlations = [correlation(guess, target, dim=dim).mean() for dim in (1, 0)]
        return (2 - mean_correlations[0] - mean_correlations[1]) * t * t
    ce = settings.ce_weight * F.cross_entropy(logits, class_shares)
    if settings.loss == "cosine":
        return 1 - correlation(logits, teacher_logits, dim=1).mean() + ce
    return F.mse_loss(logits, teacher_logits) + ce


def hard_label_loss(logits: Tensor, class_shares: Tensor) -> Tensor:
    """Return the loss of an epoch with hard labels in the middle of training, a scalar: CE with label smoothing (HALD)."""
    return F.cross_entropy(logits, class_shares, label_smoothing=HALD_SMOOTHING)


def correlation(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Return the Pearson correlation of two matrices along `dim`; it is 0, without a gradient, where one is constant."""
    (a, a_varies), (b, b_varies) = _centered(a, dim), _centered(b, dim)
    varies = a_varies & b_varies
    squares = torch.where(varies, a.square().sum(dim) * b.square().sum(dim), 1)
    return torch.where(varies, (a * b).sum(dim) / squares.sqrt(), 0)


def _centered(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return `x` minus its mean, scaled to a largest absolute value of 1, and a mask of where `x` varies along `dim`."""
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    x = x - x.mean(dim, keepdim=True)
    # Unscaled, squares of small probabilities would underflow. Correlation ignores scale, so it needs no gradient.
    spread = x.detach().abs().amax(dim, keepdim=True)
    varies = spread > rounding.clamp(min=1e-30)
    return x / torch.where(varies, spread, 1), varies.squeeze(dim)


def class_shares(labels: Tensor, partner_labels: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Mix one-hot labels as the views are mixed: three (B,) -> (B, K) float32; `weight` is the share of the image."""
    label, partner = F.one_hot(labels, num_classes).float(), F.one_hot(partner_labels, num_classes).float()
    return torch.lerp(partner, label, weight.view(-1, 1))
