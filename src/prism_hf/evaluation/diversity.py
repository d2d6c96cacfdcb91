"""Intra-class similarity: how alike the images of a class are to a network that took no part in making them.

Legend: N images, B of them at once, D features, K classes.

Intra-class cosine similarity of penultimate features, as PRISM, G-VBSM and DELT report it; high means alike. Alone it says
nothing: noise is diverse too. So it always stands beside that of random real images and of the full training set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Diversity:
    """Intra-class cosine similarity of one set of images.

    Attributes:
        per_class: Mean over all pairs of a class, in [-1, 1]; `None` for a class with fewer than two images.
        mean: Mean over the classes, or `None` if no class has two images.
    """

    per_class: tuple[float | None, ...]
    mean: float | None


class UnitSums:
    """Number of feature vectors of each class and the sum of their directions; the vectors themselves are not kept.

    The sum over pairs is (|sum of unit vectors|^2 - n) / 2, so neither an N x N matrix nor the N vectors are needed.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self._counts = torch.zeros(num_classes, dtype=torch.int64)
        self._sums = torch.zeros(num_classes, 0, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: (B, D), any scale.
            labels: (B,) int64; labels outside of the classes are ignored.
        """
        known = (labels >= 0) & (labels < len(self._counts))
        features, labels = features[known], labels[known]
        if not self._sums.shape[1]:
            self._sums = self._sums.new_zeros(len(self._counts), features.shape[1])
        self._sums.index_add_(0, labels, F.normalize(features.double(), dim=1))
        self._counts += torch.bincount(labels, minlength=len(self._counts))

    def similarity(self) -> Diversity:
        """Mean over the pairs of each class, of all batches."""
        squares = self._sums.square().sum(1)
        values = [
            (square - count) / (count * (count - 1)) if count > 1 else None
            for square, count in zip(squares.tolist(), self._counts.tolist(), strict=True)
        ]
        known = [v for v in values if v is not None]
        return Diversity(tuple(values), float(np.mean(known)) if known else None)


def intra_class_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Diversity:
    """Mean pairwise cosine similarity inside each class.

    Args:
        features: (N, D), any scale.
        labels: (N,) int64.
        num_classes: K.
    """
    sums = UnitSums(num_classes)
    sums.add(features, labels)
    return sums.similarity()
