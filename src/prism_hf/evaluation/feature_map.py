"""What pictures of features are drawn from: two principal components, and a histogram of similarities in a class.

Legend: N images, D features.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

_MOST_PAIRS_OF = 200
"""Only so many images of a class; the pairs of more would not change a histogram that anyone can see."""


class FeatureMap:
    """A plane that real images span: their first two principal components.

    Args:
        features: Of real images, (N, D) float, N and D at least 2.
    """

    def __init__(self, features: Tensor) -> None:
        # The whole decomposition: the same plane each time.
        self._pca = PCA(2, svd_solver="full").fit(features.double().numpy())

    def project(self, features: Tensor) -> list[list[float]]:
        """Features of any images (N, D) -> N points, rounded to what can be seen."""
        return np.round(self._pca.transform(features.double().numpy()), 4).tolist()


def pair_histogram(features: Tensor, labels: Tensor, *, bins: int = 40) -> dict[str, list[float]] | None:
    """Histogram of the cosine similarities of pairs inside a class, over [-1, 1].

    Args:
        features: (N, D).
        labels: (N,) int64.
        bins: Their number.

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
