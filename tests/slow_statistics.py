"""A slow, literal implementation of the layer statistics, and helpers for their tests."""

import copy
import dataclasses
import math

import torch
from torch import nn

from prism_hf.method.statistics import STATISTICS, gather_statistics, shuffled_batches

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
NETS = ("test_resnet", "test_byobnet", "test_efficientnet")


def mean_and_var(parts):
    values = torch.cat([part.reshape(-1) for part in parts])
    mean = values.mean()
    return mean, ((values - mean) ** 2).mean()


def slow_channels(x):
    return [torch.stack(v) for v in zip(*(mean_and_var([x[:, c]]) for c in range(x.shape[1])), strict=True)]


def slow_cells(x, patch):
    _, channels, height, width = x.shape
    n_h, n_w = max(1, height // patch), max(1, width // patch)
    cells = []
    for i in range(n_h):
        for j in range(n_w):
            h = slice(math.floor(i * height / n_h), math.ceil((i + 1) * height / n_h))
            w = slice(math.floor(j * width / n_w), math.ceil((j + 1) * width / n_w))
            cells.append(mean_and_var([x[:, c, h, w] for c in range(channels)]))
    return [torch.stack(v) for v in zip(*cells, strict=True)]


def slow_conv(x, patch):
    return dict(zip(STATISTICS, (*slow_channels(x), *slow_cells(x, patch)), strict=True))


def inputs_of(model, x):
    """Return every BN and convolution layer that runs, in order, with its input."""
    seen = []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(lambda m, i: seen.append((m, i[0]))) for layer in layers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def batch(dtype=torch.float32, size=32, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 3, size, size), generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def map_of(*shape, dtype=torch.float64, seed=0):
    """Return a feature map that differs between channels and between positions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    trend = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return (x * (1 + trend.abs()) + 2 * trend).to(dtype).requires_grad_()


def double(teacher):
    return dataclasses.replace(teacher, model=copy.deepcopy(teacher.model).double())


def close(a, b, tolerance):
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm()) < tolerance


def gathered(teacher, images, patch=8, **settings):
    batches = shuffled_batches(lambda rows: images[rows], len(images), **{"seed": 0, **settings})
    return gather_statistics(teacher, batches, patch=patch)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


class Small(nn.Module):
    """A network with a convolution before BatchNorm, and one after it that is used twice."""

    def __init__(self, size=4):
        super().__init__()
        self.after = nn.Conv2d(size, size, 1)
        self.norm = nn.BatchNorm2d(size)
        self.before = nn.Conv2d(3, size, 3, stride=2)
        generator = torch.Generator().manual_seed(size)
        for value in (*self.parameters(), self.norm.running_mean):
            value.data = torch.randn(value.shape, generator=generator)
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = self.after(self.norm(self.before(x)).relu())
        return self.after(x.relu()).mean((2, 3))


def small_teacher(teacher):
    """Return a teacher with the network `Small` and the preprocessing of another teacher."""
    return dataclasses.replace(teacher, name="small", model=Small(), num_classes=4)
