"""How alike the images of a class are to a network that took no part in making them, and the plane they are drawn on.

Legend: N images, B of them at once, D features, K classes.

Intra-class cosine similarity of penultimate features, as PRISM, G-VBSM and DELT report it; high means alike. Alone it says
nothing: noise is diverse too. So it always stands beside that of random real images and of the full training set.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

_MOST_PAIRS_OF = 200
"""Only so many images of a class; the pairs of more would not change a histogram that anyone can see."""


@dataclass(frozen=True)
class Diversity:
    """Intra-class cosine similarity of one set of images."""

    per_class: tuple[float | None, ...]  # mean over all pairs of a class, in [-1, 1]; `None` with fewer than two images
    mean: float | None  # over the classes, or `None` if no class has two images


def intra_class_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Diversity:
    """Mean pairwise cosine similarity inside each class, of features (N, D) of any scale and labels (N,) int64.

    Labels that are not those of the K classes are ignored.
    """
    return similarity_of_batches([(features, labels)], num_classes)


def similarity_of_batches(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Diversity:
    """As `intra_class_similarity`, of features (B, D) and labels (B,) that come in batches and are not kept.

    The sum over pairs is (|sum of unit vectors|^2 - n) / 2, so neither an N x N matrix nor the N vectors are needed.
    """
    counts, sums = torch.zeros(num_classes, dtype=torch.int64), torch.zeros(num_classes, 0, dtype=torch.float64)
    for features, labels in batches:
        known = (labels >= 0) & (labels < num_classes)
        features, labels = features[known], labels[known]
        if not sums.shape[1]:
            sums = sums.new_zeros(num_classes, features.shape[1])
        sums.index_add_(0, labels, F.normalize(features.double(), dim=1))
        counts += torch.bincount(labels, minlength=num_classes)
    values = [
        (square - count) / (count * (count - 1)) if count > 1 else None
        for square, count in zip(sums.square().sum(1).tolist(), counts.tolist(), strict=True)
    ]
    known_values = [value for value in values if value is not None]
    return Diversity(tuple(values), float(np.mean(known_values)) if known_values else None)


def pair_histogram(features: Tensor, labels: Tensor, *, bins: int = 40) -> dict[str, list[float]] | None:
    """Histogram over [-1, 1] of the cosine similarities of pairs inside a class, from features (N, D) and labels (N,).

    Returns:
        `edges` (bins + 1) and `density` (bins), whose area is 1; `None` if no class has two images.
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
    """A plane that real images span: the first two principal components of their features, (N, D), N and D at least 2."""

    def __init__(self, features: Tensor) -> None:
        # The whole decomposition: the same plane each time.
        self._pca = PCA(2, svd_solver="full").fit(features.double().numpy())

    def project(self, features: Tensor) -> list[list[float]]:
        """Features of any images (N, D) -> N points, rounded to what can be seen."""
        return np.round(self._pca.transform(features.double().numpy()), 4).tolist()
