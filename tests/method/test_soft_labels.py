import math
import statistics

import pytest
import torch
from each import each

from prism_hf.method import soft_labels
from prism_hf.method.soft_labels import class_shares, soft_label_loss


def settings_of(tiny_recipe, changes):
    return tiny_recipe({f"evaluation.{key}": value for key, value in changes.items()}).evaluation


def literal_kl(logits, teacher_logits, temperature):
    p, q = ((t / temperature).softmax(1) for t in (teacher_logits, logits))
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def some_batch():
    shares = torch.rand(5, 4, dtype=torch.float64).softmax(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), shares


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kl_equals_the_formula_and_is_zero_at_its_optimum(tiny_recipe, temperature):
    settings = settings_of(tiny_recipe, {"loss": "kl", "temperature": temperature})
    logits, teacher_logits, shares = some_batch()
    ours = soft_label_loss(logits, teacher_logits, shares, settings)
    torch.testing.assert_close(ours, literal_kl(logits, teacher_logits, temperature))
    # Softmax ignores an offset, so any shifted copy of the teacher's logits is an optimum.
    assert abs(float(soft_label_loss(teacher_logits + 3, teacher_logits, shares, settings))) < 1e-10


@pytest.mark.parametrize("ce_weight", [0.0, 0.1, 2.0])
def test_mse_ce_equals_the_formula(tiny_recipe, ce_weight):
    settings = settings_of(tiny_recipe, {"loss": "mse_ce", "ce_weight": ce_weight})
    logits, teacher_logits, shares = some_batch()
    mse = ((logits - teacher_logits) ** 2).mean()
    ce = -(shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft_label_loss(logits, teacher_logits, shares, settings), mse + ce_weight * ce)


def literal_loss(logits, teacher_logits, shares, loss, ce_weight, temperature):
    """Compute the loss element by element."""
    rows, classes = len(logits), len(logits[0])

    def softmax(row, t=1.0):
        powers = [math.exp((value - max(row)) / t) for value in row]
        return [power / sum(powers) for power in powers]

    ce = 0.0
    for row, share in zip(logits, shares, strict=True):
        ce -= sum(s * math.log(p) for s, p in zip(share, softmax(row), strict=True)) / rows
    if loss == "mse_ce":
        squares = [(a - b) ** 2 for x, y in zip(logits, teacher_logits, strict=True) for a, b in zip(x, y, strict=True)]
        return sum(squares) / len(squares) + ce_weight * ce
    if loss == "cosine":
        total = 0.0
        for a, b in zip(logits, teacher_logits, strict=True):
            a, b = [x - sum(a) / classes for x in a], [x - sum(b) / classes for x in b]
            total += sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        return 1 - total / rows + ce_weight * ce
    guess = [softmax(row, temperature) for row in logits]
    target = [softmax(row, temperature) for row in teacher_logits]
    if loss == "kl":
        pairs = [(q, p) for x, y in zip(target, guess, strict=True) for q, p in zip(x, y, strict=True)]
        return temperature**2 * sum(q * math.log(q / p) for q, p in pairs) / rows
    inter = [statistics.correlation(p, q) for p, q in zip(guess, target, strict=True)]
    columns = zip(zip(*guess, strict=True), zip(*target, strict=True), strict=True)
    intra = [statistics.correlation(p, q) for p, q in columns]
    return temperature**2 * ((1 - sum(inter) / rows) + (1 - sum(intra) / classes))


LOSSES = ("mse_ce", "kl", "dist", "cosine")


@each("temperature", [1.0, 20.0])
@each("ce_weight", [0.0, 0.3])
@each("loss", LOSSES)
def test_a_loss_equals_its_literal_version(tiny_recipe, loss, ce_weight, temperature):
    settings = settings_of(tiny_recipe, {"loss": loss, "ce_weight": ce_weight, "temperature": temperature})
    batch = some_batch()
    expected = literal_loss(*(values.tolist() for values in batch), loss, ce_weight, temperature)
    assert float(soft_label_loss(*batch, settings)) == pytest.approx(expected, rel=1e-10)
    single = soft_label_loss(*(values.float() for values in batch), settings)
    assert float(single) == pytest.approx(expected, rel=1e-4)
    assert single.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_a_loss_passes_gradcheck(tiny_recipe, loss):
    settings = settings_of(tiny_recipe, {"loss": loss, "temperature": 2.0})
    logits, teacher_logits, shares = some_batch()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_label_loss(x, teacher_logits, shares, settings), logits)


@pytest.mark.parametrize("loss", ["dist", "cosine"])
def test_a_correlation_loss_is_least_at_its_optimum_and_ignores_an_offset(tiny_recipe, loss):
    settings = settings_of(tiny_recipe, {"loss": loss, "ce_weight": 0.0})
    logits, teacher_logits, shares = some_batch()
    offset = torch.randn(5, 1, dtype=torch.float64)
    ours = soft_label_loss(logits, teacher_logits, shares, settings)
    assert float(soft_label_loss(logits + offset, teacher_logits, shares, settings)) == pytest.approx(float(ours))
    assert abs(float(soft_label_loss(teacher_logits + offset, teacher_logits, shares, settings))) < 1e-10
    if loss == "cosine":
        assert abs(float(soft_label_loss(3 * teacher_logits, teacher_logits, shares, settings))) < 1e-10


def degenerate(kind):
    logits, teacher_logits, shares = (values.float() for values in some_batch())
    if kind == "one image":
        return logits[:1], teacher_logits[:1], shares[:1]
    if kind == "a flat row":
        logits[0], teacher_logits[1] = 0.7, -3.0
    if kind == "all flat":
        logits[:], teacher_logits[:] = 0.1, 0.3
    if kind == "student flat":
        logits[:] = 0.1
    if kind == "equal rows":  # each column is constant
        logits[:], teacher_logits[:] = logits[0].clone(), teacher_logits[0].clone()
    if kind == "far apart":  # probabilities of other classes are zero, or nearly
        logits[:] = torch.linspace(-400, 400, 5).view(-1, 1) * torch.tensor([1.0, -1.0, 0.2, 0.0])
    if kind == "the same":
        logits[:] = teacher_logits
    return logits, teacher_logits, shares


KINDS = ("one image", "a flat row", "all flat", "student flat", "equal rows", "far apart", "the same")


@each("temperature", [1.0, 20.0])
@each("kind", KINDS)
@each("loss", LOSSES)
def test_the_gradient_is_finite_for_degenerate_input(tiny_recipe, loss, kind, temperature):
    logits, teacher_logits, shares = degenerate(kind)
    logits.requires_grad_()
    value = soft_label_loss(
        logits, teacher_logits, shares, settings_of(tiny_recipe, {"loss": loss, "temperature": temperature})
    )
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e4, "rounding noise must not be amplified into a gradient"


def test_constant_input_has_no_correlation_and_no_gradient():
    a = torch.tensor([[0.1] * 7, [0.1, 0.2, 0.3, 0.1, 0.5, 0.6, 0.9]], requires_grad=True)
    found = soft_labels.correlation(a, torch.rand(2, 7), dim=1)
    found.sum().backward()
    assert float(found[0].detach()) == 0
    assert not a.grad[0].any()
    assert a.grad[1].any()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_a_correlation_ignores_the_scale(scale):
    a, b = torch.rand(4, 9), torch.rand(4, 9)
    torch.testing.assert_close(soft_labels.correlation(a * scale, b, dim=0), soft_labels.correlation(a, b, dim=0))


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ({}, {"loss": "kl"}),
        ({}, {"ce_weight": 0.5}),
        ({"loss": "kl"}, {"loss": "kl", "temperature": 2.0}),
        ({"loss": "kl"}, {"loss": "dist"}),
        ({"loss": "dist"}, {"loss": "dist", "temperature": 2.0}),
        ({"loss": "cosine"}, {"loss": "cosine", "ce_weight": 0.5}),
    ],
)
def test_every_setting_of_the_loss_changes_it(tiny_recipe, start, change):
    batch = some_batch()
    a, b = (soft_label_loss(*batch, settings_of(tiny_recipe, settings)) for settings in (start, change))
    assert float(a) != pytest.approx(float(b))


def test_class_shares_mix_the_two_classes():
    shares = class_shares(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.tensor([0.75, 0.3, 1.0]), 3)
    torch.testing.assert_close(shares, torch.tensor([[0.75, 0, 0.25], [0, 1, 0], [0, 0, 1]]))
    assert shares.dtype == torch.float32
