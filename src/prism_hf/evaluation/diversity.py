"""Diversity: intra-class similarity in the features of a network not used for synthesis, and a 2-D map of the features.

Legend: N images, B images per batch, D features, K classes.

Intra-class cosine similarity of penultimate features is measured as in PRISM, G-VBSM and DELT; high means similar. Alone it
proves nothing, because noise is diverse too. Reports always include the values of random real images and all real images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

_MOST_PAIRS_OF = 200
"""Maximum images per class in a histogram; more pairs would not change it visibly."""


@dataclass(frozen=True)
class Diversity:
    """The intra-class cosine similarity of one set of images."""

    per_class: tuple[float | None, ...]  # mean over all pairs of a class, in [-1, 1]; `None` for fewer than two images
    mean: float | None  # mean over the classes, or `None` if no class has two images


def intra_class_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Diversity:
    """Return the mean pairwise cosine similarity within each class, from features (N, D), any scale, and labels (N,) int64.

    Images with labels outside of 0 to K - 1 are ignored.
    """
    return similarity_of_batches([(features, labels)], num_classes)


def similarity_of_batches(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Diversity:
    """Compute `intra_class_similarity` from batches of features (B, D) and labels (B,), which are not kept.

    The sum over pairs is (|sum of unit vectors|^2 - n) / 2, so neither an N x N matrix nor all N vectors are needed.
    """
    counts, sums = torch.zeros(num_classes, dtype=torch.int64), torch.zeros(num_classes, 0, dtype=torch.float64)
    for features, labels in batches:
        valid = (labels >= 0) & (labels < num_classes)
        features, labels = features[valid], labels[valid]
        if not sums.shape[1]:
            sums = sums.new_zeros(num_classes, features.shape[1])
        sums.index_add_(0, labels, F.normalize(features.double(), dim=1))
        counts += torch.bincount(labels, minlength=num_classes)
    values = [
        (square - count) / (count * (count - 1)) if count > 1 else None
        for square, count in zip(sums.square().sum(1).tolist(), counts.tolist(), strict=True)
    ]
    defined = [value for value in values if value is not None]
    return Diversity(tuple(values), float(np.mean(defined)) if defined else None)


def pair_histogram(features: Tensor, labels: Tensor, *, bins: int = 40) -> dict[str, list[float]] | None:
    """Return a histogram over [-1, 1] of the cosine similarity of pairs within a class, of features (N, D), labels (N,).

    Returns:
        `edges` (bins + 1 values) and `density` (bins values, with area 1); `None` if no class has two images.
    """
    counts, edges = np.zeros(bins), np.linspace(-1, 1, bins + 1)
    for label in labels.unique().tolist():
        unit = F.normalize(features[labels == label][:_MOST_PAIRS_OF].double(), dim=1)
        upper = torch.triu_indices(len(unit), len(unit), offset=1)
        cosines = (unit @ unit.T)[upper[0], upper[1]].clamp(-1, 1)
        counts += np.histogram(cosines.numpy(), edges)[0]
    if not counts.sum():
        return None
    return {"edges": edges.tolist(), "density": (counts / counts.sum() / (edges[1] - edges[0])).tolist()}


class FeatureMap:
    """A plane for feature maps: the first two principal components of real images' features, (N, D), N and D at least 2."""

    def __init__(self, features: Tensor) -> None:
        # The full decomposition is deterministic: the plane is the same each time.
        self._pca = PCA(2, svd_solver="full").fit(features.double().numpy())

    def project(self, features: Tensor) -> list[list[float]]:
        """Project features (N, D) of any images to N points (x, y), rounded to 4 decimals."""
        return np.round(self._pca.transform(features.double().numpy()), 4).tolist()
