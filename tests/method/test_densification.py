import math

import pytest
import torch
from torch import nn

from prism_hf.method.densification import densification


def batch(count=6, size=8, channels=3, seed=0, dtype=torch.float64, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn((count, channels, size, size), generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def pooled(image, size):
    """Adaptive average pooling by hand: each output pixel is the mean of the pixels it covers."""
    channels, height, width = image.shape
    values = []
    for c in range(channels):
        for i in range(size):
            for j in range(size):
                h = slice(i * height // size, math.ceil((i + 1) * height / size))
                w = slice(j * width // size, math.ceil((j + 1) * width / size))
                values.append(image[c, h, w].mean())
    return torch.stack(values)


def slow_densification(images, labels, temperature, size):
    """Compute the equation with plain loops, and the eigenvalues as lengths of the principal axes."""
    total = 0.0
    for label in sorted(set(labels.tolist())):
        rows = [n for n, other in enumerate(labels.tolist()) if other == label]
        if len(rows) < 2:
            continue
        x = torch.stack([pooled(images[row], size) for row in rows])
        eigenvalues = [value**2 for value in torch.linalg.svdvals(x)]
        soft = [math.exp(value.item() / temperature) for value in eigenvalues]
        target = [value / sum(soft) for value in soft]
        normalizer = torch.log(sum(torch.exp(value) for value in eigenvalues))
        for p, value in zip(target, eigenvalues, strict=True):
            total = total + p * (math.log(p) - (value - normalizer))
    return total


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2], [4, 1, 4, 1, 4, 1], [7] * 6], ids=str)
@pytest.mark.parametrize(("temperature", "size"), [(4.0, 4), (2.0, 3), (4.0, 8), (4.0, 12), (0.5, 4)])
def test_densification_equals_the_equation(labels, temperature, size):
    labels, ours, literal = torch.tensor(labels), batch(), batch()
    value = densification(ours, labels, temperature=temperature, size=size)
    slow = slow_densification(literal, labels, temperature, size)
    value.backward()
    slow.backward()
    assert value.shape == ()
    assert float(value) > 1e-4
    torch.testing.assert_close(value, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, literal.grad, rtol=1e-8, atol=1e-12)


def test_the_defaults_are_the_published_values():
    images, labels = batch(size=40), torch.tensor([0, 0, 0, 1, 1, 1])
    expected = densification(images, labels, temperature=4.0, size=32)
    torch.testing.assert_close(densification(images, labels), expected, rtol=0, atol=0)
    assert float(expected) != float(densification(images, labels, size=20))


def test_the_target_carries_no_gradient():
    """A gradient through the target would change the result, except at temperature 1, where it is zero either way."""
    images, labels = batch(), torch.zeros(6, dtype=torch.int64)
    value = densification(images, labels, temperature=1.0, size=8)
    (gradient,) = torch.autograd.grad(value, images)
    assert abs(float(value)) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


def test_a_step_against_the_gradient_spreads_a_class():
    images, labels = batch(), torch.zeros(6, dtype=torch.int64)
    value = densification(images, labels, size=8)
    (gradient,) = torch.autograd.grad(value, images)
    assert float(densification(images - 0.1 * gradient, labels, size=8)) < float(value)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5], []], ids=["one of each", "no image"])
def test_without_a_class_of_two_images_value_and_gradient_are_zero(labels):
    images = batch(count=len(labels))
    value = densification(images, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert value.shape == ()
    assert float(value) == 0
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_a_class_of_one_image_gets_no_gradient():
    images = batch(count=3)
    densification(images, torch.tensor([0, 1, 0])).backward()
    assert float(images.grad[1].abs().max()) == 0
    assert float(images.grad[[0, 2]].abs().max()) > 0


def test_densification_does_not_depend_on_the_order_of_the_images():
    images, labels = batch(), torch.tensor([0, 1, 0, 1, 1, 2])
    order = torch.tensor([5, 2, 4, 0, 1, 3])
    torch.testing.assert_close(densification(images[order], labels[order]), densification(images, labels))


def test_equal_images_have_a_finite_gradient():
    images = batch(count=1).detach().repeat(4, 1, 1, 1).requires_grad_()
    densification(images, torch.zeros(4, dtype=torch.int64), size=8).backward()
    assert bool(images.grad.isfinite().all())


@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_half_precision_and_autocast_compute_in_float32(scale):
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    half = batch(dtype=torch.bfloat16, scale=scale)
    wide = half.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = densification(half, labels, size=8)
    value.backward()
    expected = densification(wide, labels, size=8)
    expected.backward()
    assert value.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(half.grad.double(), wide.grad, rtol=0.02, atol=1e-4)


def test_gradient_reaches_pixels_through_a_view():
    images = batch(size=16)
    densification(nn.functional.avg_pool2d(images, 2), torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert float(images.grad.abs().max()) > 0
