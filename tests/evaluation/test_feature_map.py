import math

import numpy as np
import torch

from prism_hf.evaluation.feature_map import FeatureMap, pair_histogram


def features(count=30, dim=8, seed=0):
    return torch.randn((count, dim), generator=torch.Generator().manual_seed(seed)) * torch.arange(1, dim + 1)


def test_the_plane_is_that_of_the_two_largest_directions():
    real, other = features(), features(5, seed=1)
    centred = (real - real.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = ((other - real.mean(0)).double() @ vectors[:, -2:].flip(1)).numpy()
    ours = np.array(FeatureMap(real).project(other))
    assert values[-1] > values[-2]
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-3)


def test_the_same_features_give_the_same_plane_and_real_images_lie_around_its_middle():
    one, two = FeatureMap(features()), FeatureMap(features())
    points = one.project(features())
    assert points == two.project(features())
    assert np.abs(np.mean(points, axis=0)).max() < 1e-3


def test_pairs_are_counted_inside_a_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    x = torch.tensor([[1.0, 0], [0, 2], [1, 0], [3, 0], [-1, 0], [5, 5]])
    found = pair_histogram(x, labels, bins=4)
    assert found["edges"] == [-1, -0.5, 0, 0.5, 1]
    # cosines: 0 | 1, -1, -1 | none
    assert found["density"] == [2 / 4 / 0.5, 0, 1 / 4 / 0.5, 1 / 4 / 0.5]


def test_the_area_is_one_and_lengths_do_not_matter():
    x, labels = features(40), torch.arange(40) % 4
    found = pair_histogram(x, labels)
    assert math.isclose(sum(found["density"]) * (found["edges"][1] - found["edges"][0]), 1)
    assert pair_histogram(x * torch.rand(40, 1).add(0.1), labels) == found


def test_single_images_have_no_pairs():
    assert pair_histogram(features(3), torch.arange(3)) is None
