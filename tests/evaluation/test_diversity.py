import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prism_hf.errors import TeacherError
from prism_hf.evaluation.diversity import FeatureMap, intra_class_similarity, pair_histogram, similarity_of_batches
from prism_hf.images.pixels import to_reference
from prism_hf.models.teacher import penultimate_features


def test_similarity_is_the_mean_over_all_pairs():
    features, labels = torch.randn(12, 6), torch.arange(12) % 3
    found = intra_class_similarity(features, labels, 3)
    for label in range(3):
        own = features[labels == label]
        pairs = [torch.cosine_similarity(own[i], own[j], dim=0) for i in range(4) for j in range(i)]
        assert found.per_class[label] == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-5)
    assert found.mean == pytest.approx(sum(found.per_class) / 3)


def similarity_of_kept_features(features, labels, num_classes):
    """Compute the formula from the unit vectors of a class, all in memory."""
    units = F.normalize(features.double(), dim=1)
    for label in range(num_classes):
        own = units[labels == label]
        yield float((own.sum(0).square().sum() - len(own)) / (len(own) * (len(own) - 1)))


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_features_in_batches_give_the_same_similarity_as_all_at_once(batch):
    features, labels = torch.randn(500, 32) + 0.3, torch.randint(10, (500,))
    batches = zip(features.split(batch), labels.split(batch), strict=True)
    kept = list(similarity_of_kept_features(features, labels, 10))
    assert similarity_of_batches(batches, 10).per_class == pytest.approx(kept, abs=1e-14)
    assert intra_class_similarity(features, labels, 10).per_class == pytest.approx(kept, abs=1e-14)


def test_no_batches_give_no_similarity():
    assert similarity_of_batches([], 2).per_class == (None, None)


def test_an_image_without_a_class_is_ignored():
    features = torch.randn(5, 3)
    with_strays = intra_class_similarity(features, torch.tensor([0, 0, -1, 1, 2]), 2)
    assert with_strays.per_class == intra_class_similarity(features[:2], torch.tensor([0, 0]), 2).per_class


def test_copies_have_similarity_one_and_opposites_and_orthogonals_do_not():
    features = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-2.0, -2.0]])
    found = intra_class_similarity(features, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    assert found.per_class == pytest.approx((1.0, 0.0, -1.0), abs=1e-7)


def test_scale_and_order_do_not_matter():
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    order = torch.randperm(9)
    scaled = features * torch.rand(9, 1).add(0.1)
    a, b = (
        intra_class_similarity(features, labels, 3),
        intra_class_similarity(scaled[order], labels[order], 3),
    )
    assert a.per_class == pytest.approx(b.per_class, abs=1e-6)


def test_a_class_without_pairs_has_no_similarity():
    found = intra_class_similarity(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1]), 3)
    assert found.per_class == (pytest.approx(1.0), None, None)
    assert found.mean == pytest.approx(1.0)
    assert intra_class_similarity(torch.ones(1, 2), torch.tensor([0]), 2).mean is None


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_features_are_the_input_of_the_classifier(tiny_teachers, tiny_images, name):
    teacher = tiny_teachers[name]
    batches = list(penultimate_features(teacher, lambda rows: tiny_images[list(rows)], 7, batch_size=3))
    assert [rows for rows, _ in batches] == [range(0, 3), range(3, 6), range(6, 7)]
    found = torch.cat([features for _, features in batches])
    with torch.no_grad():
        hidden = teacher.model.forward_features(teacher.prepare(to_reference(tiny_images)))
        expected = teacher.model.forward_head(hidden, pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    classifier = teacher.model.get_classifier()
    assert not classifier._forward_pre_hooks
    torch.testing.assert_close(classifier(found), teacher.logits(to_reference(tiny_images)), rtol=1e-4, atol=1e-5)


def test_a_network_without_a_linear_layer_is_an_error(tiny_teachers, tiny_images):
    convolutional = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = dataclasses.replace(tiny_teachers["test_resnet"], name="conv", model=convolutional)
    with pytest.raises(TeacherError, match="network 'conv' has no linear layer"):
        next(penultimate_features(teacher, lambda rows: tiny_images[list(rows)], 7))


# -- pictures ------------------------------------------------------------------------------------------------------------


def features(count=30, dim=8, seed=0):
    return torch.randn((count, dim), generator=torch.Generator().manual_seed(seed)) * torch.arange(1, dim + 1)


def test_the_plane_has_the_two_directions_of_largest_variance():
    real, other = features(), features(5, seed=1)
    centered = (real - real.mean(0)).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    expected = ((other - real.mean(0)).double() @ vectors[:, -2:].flip(1)).numpy()
    ours = np.array(FeatureMap(real).project(other))
    assert values[-1] > values[-2]
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-3)


def test_the_plane_is_deterministic_and_centered_on_real_images():
    one, two = FeatureMap(features()), FeatureMap(features())
    points = one.project(features())
    assert points == two.project(features())
    assert np.abs(np.mean(points, axis=0)).max() < 1e-3


def test_pairs_are_counted_within_a_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    x = torch.tensor([[1.0, 0], [0, 2], [1, 0], [3, 0], [-1, 0], [5, 5]])
    found = pair_histogram(x, labels, bins=4)
    assert found["edges"] == [-1, -0.5, 0, 0.5, 1]
    # cosines: 0 | 1, -1, -1 | none
    assert found["density"] == [2 / 4 / 0.5, 0, 1 / 4 / 0.5, 1 / 4 / 0.5]


def test_the_area_is_one_and_vector_lengths_do_not_matter():
    x, labels = features(40), torch.arange(40) % 4
    found = pair_histogram(x, labels)
    assert math.isclose(sum(found["density"]) * (found["edges"][1] - found["edges"][0]), 1)
    assert pair_histogram(x * torch.rand(40, 1).add(0.1), labels) == found


def test_single_images_have_no_pairs():
    assert pair_histogram(features(3), torch.arange(3)) is None
