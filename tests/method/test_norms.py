"""Teachers without batch norm: the statistics of the inputs of their layer norms and group norms."""

import dataclasses

import pytest
import timm
import torch
from conftest import make_teacher
from each import each
from pipeline import one_line
from slow_statistics import batch, mean_and_var

from prism_hf.errors import TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.method.alignment import Alignment, describe_norms
from prism_hf.method.statistics import gather_norms, shuffled_batches
from prism_hf.models.norms import frozen

NETS = ("test_vit", "test_convnext", "test_efficientnet_gn", "test_efficientnet_ln", "mixer")
"""Tokens (B, N, C), maps of both layouts, and group norms."""


class Mixer(torch.nn.Module):
    """A layer norm that runs twice, on tokens and on the pooled vector (B, C)."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.LayerNorm(8), torch.nn.Linear(8, 10)

    def forward(self, x):
        tokens = self.norm(self.stem(x).flatten(2).mT)
        return self.head(self.norm(tokens.sin().mean(1)))


def teacher(name):
    if name != "mixer":
        return make_teacher(name)
    torch.manual_seed(0)
    return dataclasses.replace(make_teacher("test_resnet"), name="mixer", model=frozen(Mixer()))


def inputs_of(model, x):
    """Return the input of every layer norm and group norm that runs, in order, with its channels in front: (C, values)."""
    seen = []

    def record(layer, inputs):
        (value,) = inputs
        first = value.ndim == 4 and not (isinstance(layer, torch.nn.LayerNorm) and "2d" not in type(layer).__name__)
        seen.append([part.reshape(-1) for part in (value.unbind(1) if first else value.unbind(-1))])

    layers = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.GroupNorm)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def images(count=24):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def gathered(known, pixels, size=10):
    return gather_norms(known, shuffled_batches(lambda rows: pixels[rows], len(pixels), seed=0, batch_size=size))


@each("name", NETS)
def test_averages_over_real_images_equal_the_literal_version(name):
    known, pixels = teacher(name), images()
    found = gathered(known, pixels)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    totals = None
    for rows in order.split(10):
        with torch.no_grad():
            seen = inputs_of(known.model, known.prepare(to_reference(pixels[rows])))
        here = [[torch.stack(v) for v in zip(*(mean_and_var([c.double()]) for c in layer), strict=True)] for layer in seen]
        weighted = [[value * len(rows) / 24 for value in pair] for pair in here]
        totals = (
            weighted
            if totals is None
            else [[a + b for a, b in zip(*p, strict=True)] for p in zip(totals, weighted, strict=True)]
        )
    assert len(found) == 2 * len(totals) > 0
    for number, (mean, var) in enumerate(totals):
        torch.testing.assert_close(found[f"norm.{number}.mean"].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"norm.{number}.var"].double(), var, rtol=1e-4, atol=1e-5)


@each("reduction", ("sum", "mean"))
@each("name", NETS)
def test_the_loss_and_its_gradient_equal_the_literal_version(name, reduction):
    known = teacher(name)
    targets, x = gathered(known, images()), batch()
    align = Alignment(known.model, norms=targets, reduction=reduction, first_bn_multiplier=3.0)
    logits, ours = align(x)
    assert torch.equal(logits, known.model(x)), "the network computes what it did"
    total = 0.0
    seen = inputs_of(known.model, y := x.detach().clone().requires_grad_())
    for number, layer in enumerate(seen):
        mean, var = (torch.stack(v) for v in zip(*(mean_and_var([c.double()]) for c in layer), strict=True))
        gaps = (mean - targets[f"norm.{number}.mean"]).norm() + (var - targets[f"norm.{number}.var"]).norm()
        total = total + (3.0 if number == 0 else 1.0) * gaps
    total = total / len(seen) if reduction == "mean" else total
    torch.testing.assert_close(ours.double(), total, rtol=1e-4, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(ours, x), torch.autograd.grad(total, y)
    assert float((a - b).norm() / b.norm()) < 1e-3
    assert torch.allclose(align(x.detach(), head=False).mismatch, ours.detach()), "also without the head"


def test_a_network_with_batch_norm_keeps_it_and_is_not_measured():
    known = make_teacher("test_resnet")
    assert gathered(known, images()) == {}
    assert "not in it: none" in describe_norms(known.model)
    text = describe_norms(teacher("test_vit").model)
    assert "LayerNorm in BN alignment" not in text
    assert text.startswith("norm layers in BN alignment: ")
    assert "not in it: none" in text


def test_a_network_without_any_norm_is_refused_in_one_line():
    bare = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(TeacherError) as error:
        Alignment(frozen(bare), name="bare")
    assert "'bare' has no BatchNorm layer with running statistics, and no layer norm or group norm" in one_line(error)


def test_a_pass_without_the_statistics_of_real_images_is_refused():
    with pytest.raises(TeacherError, match="norm 0 has no statistics of real images"):
        Alignment(teacher("test_vit").model, name="vit")(batch())


def test_all_names_are_in_timm():
    assert all(timm.is_model(name) for name in NETS if name != "mixer")
