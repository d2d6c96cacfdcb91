import copy
import math

import pytest
import timm
import torch
from pipeline import one_line
from slow_statistics import (
    NETS,
    TOLERANCE,
    batch,
    close,
    double,
    gathered,
    inputs_of,
    same,
    slow_channels,
    slow_conv,
    small_teacher,
)
from timm.layers import BatchNormAct2d
from torch import nn

from prism_hf.errors import TeacherError
from prism_hf.method.alignment import Alignment, describe_norms
from prism_hf.method.statistics import STATISTICS, conv_statistics
from prism_hf.runtime.store import Artifact
from prism_hf.runtime.tensors import read_tensors, write_tensors

every_net = pytest.mark.parametrize("name", NETS)


class SlowMismatch:
    """R with plain loops, and the gradient of a norm by hand, as that of (unit vector of the difference) . (statistic)."""

    def __init__(self, model, *, momentum, conv, patch, reduction, first):
        self.model, self.momentum, self.conv, self.patch = model, momentum, conv, patch
        self.reduction, self.first, self.past = reduction, first, {}

    def __call__(self, x):
        value, linear, norms, convs = 0.0, 0.0, 0, 0
        for layer, seen in inputs_of(self.model, x):
            if isinstance(layer, nn.BatchNorm2d):
                weight, key = (1.0 if norms else self.first), ("bn", norms)
                batch = dict(zip(("mean", "var"), slow_channels(seen), strict=True))
                target = {"mean": layer.running_mean, "var": layer.running_var}
                norms += 1
            else:
                weight, key = 1.0, ("conv", convs)
                batch = slow_conv(seen, self.patch)
                target = {name: self.conv[f"{convs}.{name}"] for name in STATISTICS}
                convs += 1
            for name, statistic in batch.items():
                now = statistic.detach()
                if (*key, name) in self.past:
                    now = self.momentum * self.past[*key, name] + (1 - self.momentum) * now
                self.past[*key, name] = now
                difference = now - target[name]
                norm = math.sqrt(sum(float(d) ** 2 for d in difference))
                value += weight * norm
                if norm:  # the inputs of some byobnet layers are all zero
                    linear = linear + weight * (difference / norm * statistic).sum()
        count = norms + convs if self.reduction == "mean" else 1
        (gradient,) = torch.autograd.grad(linear / count, x)
        return value / count, gradient


@pytest.fixture
def small(tiny_teachers):
    return small_teacher(tiny_teachers["test_resnet"])


def norm_layer(channels=5, dtype=torch.float64, seed=0):
    layer = nn.BatchNorm2d(channels).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    layer.running_mean.copy_(torch.randn(channels, generator=generator))
    layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
    return layer


def slow_mismatch(x, layer):
    mean = x.mean((0, 2, 3))
    var = ((x - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
    return ((mean - layer.running_mean) ** 2).sum().sqrt() + ((var - layer.running_var) ** 2).sum().sqrt()


def mismatch(x, layer):
    """Return R of a network that consists of this one layer."""
    align = Alignment(nn.Sequential(layer), first_bn_multiplier=1.0)
    return align(x).mismatch


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_mismatch_of_a_layer_equals_the_formula(dtype, layout):
    layer = norm_layer(dtype=dtype)
    x = torch.randn(4, 5, 6, 7, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, slow = mismatch(x, layer), slow_mismatch(y, layer)
    (3 * ours).backward()
    (3 * slow).backward()
    assert close(ours, slow, TOLERANCE[dtype])
    assert close(x.grad, y.grad, TOLERANCE[dtype])
    assert x.grad.is_contiguous(memory_format=layout)


def test_mismatch_passes_gradcheck():
    layer = norm_layer()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: mismatch(t, layer), x)


def test_half_precision_is_reduced_in_float32():
    layer = norm_layer(dtype=torch.float32)
    x = (torch.randn(4, 5, 6, 6) * 3 + 2).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    ours, slow = mismatch(x, layer), slow_mismatch(wide, layer)
    ours.backward()
    slow.backward()
    assert ours.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    assert close(ours, slow, 1e-5)
    assert close(x.grad.float(), wide.grad, 0.02)


def test_mismatch_is_zero_at_its_optimum_and_grows_away_from_it():
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    layer = norm_layer()
    layer.running_mean.copy_(x.mean((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3), correction=0))
    assert float(mismatch(x, layer)) < 1e-12
    assert float(mismatch(x + 0.1, layer)) > 0.1
    assert float(mismatch(x * 1.1, layer)) > 0.1


@pytest.mark.parametrize("exact", ["mean and var", "mean", "var"])
def test_a_norm_of_exactly_zero_has_a_zero_gradient(exact):
    layer = norm_layer(channels=2)
    x = torch.tensor([0.5, -2.0], dtype=torch.float64).view(1, 2, 1, 1).repeat(3, 1, 4, 4).requires_grad_()
    if "mean" in exact:
        layer.running_mean.copy_(torch.tensor([0.5, -2.0]))
    if "var" in exact:
        layer.running_var.zero_()
    value = mismatch(x, layer)
    value.backward()
    assert bool(x.grad.isfinite().all())
    # The variance of a constant does not change to first order: only a wrong mean gives a gradient.
    assert bool((x.grad != 0).any()) == ("mean" not in exact)
    assert (value.item() == 0) == (exact == "mean and var")


def test_mismatch_does_not_depend_on_positions():
    layer, x = norm_layer(), torch.randn(4, 5, 6, 6, dtype=torch.float64)
    shuffled = x.flip(0).permute(0, 1, 3, 2)
    torch.testing.assert_close(mismatch(x, layer), mismatch(shuffled, layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_an_activation_is_saved(dtype):
    x, saved = torch.randn(4, 5, 6, 6).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mismatch(x, norm_layer(dtype=torch.float32))
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() > 3 * 5}
    assert large == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_layers_are_changed_during_a_pass_only(tiny_teachers, name):
    teacher = tiny_teachers[name]

    def changed():
        return sum("forward" in vars(m) for m in teacher.model.modules())

    inside = []
    handle = teacher.model.get_classifier().register_forward_hook(lambda *_: inside.append(changed()))
    x = teacher.prepare(batch().detach())
    align = Alignment(teacher.model)
    align(x)
    assert changed() == 0
    handle.remove()
    assert inside == [sum(isinstance(m, nn.BatchNorm2d) for m in teacher.model.modules())]
    with pytest.raises(RuntimeError):
        align(x[:, :2])
    assert changed() == 0


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_head_is_skipped_from_the_second_call_on(tiny_teachers, name, reduction):
    teacher, runs = tiny_teachers[name], []
    x = teacher.prepare(batch()).detach().requires_grad_()
    handle = teacher.model.get_classifier().register_forward_hook(lambda *_: runs.append(1))
    results = []
    try:
        align = Alignment(teacher.model, reduction=reduction)
        for head in (True, False, False, True, False):
            aligned = align(x, head=head)
            (gradient,) = torch.autograd.grad(aligned.mismatch, x)
            results.append((aligned, gradient, len(runs)))
    finally:
        handle.remove()
    assert [count for *_, count in results] == [1, 1, 1, 2, 2]
    assert [aligned.logits is not None for aligned, *_ in results] == [True, False, False, True, False]
    assert all(torch.equal(aligned.mismatch, results[0][0].mismatch) for aligned, *_ in results)
    assert all(torch.equal(gradient, results[0][1]) for _, gradient, _ in results)
    assert torch.equal(results[3][0].logits, teacher.model(x))


def test_first_call_without_head_still_counts_all_layers(tiny_teachers):
    teacher = tiny_teachers["test_resnet"]
    x = teacher.prepare(batch().detach())
    align = Alignment(teacher.model)
    first, second = align(x, head=False), align(x, head=False)
    assert first.logits is None
    assert torch.equal(first.mismatch, second.mismatch)


def test_the_first_layer_is_the_first_to_run_not_the_first_registered():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.start = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.last(self.start(x) * 2).mean((2, 3))

    model, x = Backwards().eval().requires_grad_(False), batch().detach()
    align = Alignment(model, first_bn_multiplier=10.0)
    ours = align(x).mismatch
    expected = 10 * slow_mismatch(x, model.start) + slow_mismatch(model.start(x) * 2, model.last)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.BatchNorm2d(3, track_running_stats=False),
    ],
    ids=["no norm", "no running statistics"],
)
def test_a_network_with_nothing_to_align_is_an_error(model):
    with pytest.raises(TeacherError, match="'alexnet' has no BatchNorm layer with running statistics") as error:
        Alignment(model, name="alexnet")
    assert "teachers.bn_pool" in str(error.value)


# -- with convolutions and moving averages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "momentum", "reduction", "first"),
    [(name, 0.4, "sum", 10.0) for name in NETS] + [("test_byobnet", 0.4, "mean", 1.0), ("test_byobnet", 0.0, "sum", 0.3)],
)
def test_alignment_equals_the_equation_over_several_batches(tiny_teachers, tiny_images, name, momentum, reduction, first):
    teacher = double(tiny_teachers[name])
    conv = gathered(tiny_teachers[name], tiny_images)
    slow = SlowMismatch(teacher.model, momentum=momentum, conv=conv, patch=8, reduction=reduction, first=first)
    ours = Alignment(teacher.model, momentum=momentum, conv=conv, patch=8, reduction=reduction, first_bn_multiplier=first)
    for seed in range(3):
        x = teacher.prepare(batch(torch.float64, seed=seed)).detach().requires_grad_()
        aligned = ours(x)
        (gradient,) = torch.autograd.grad(aligned.mismatch, x)
        if not momentum:
            slow.past.clear()
        value, literal = slow(x)
        assert float(aligned.mismatch.detach()) == pytest.approx(value, rel=1e-7)
        assert close(gradient, literal, 1e-7)
    if momentum:
        expected = {".".join(map(str, key)): value for key, value in slow.past.items()}
        assert set(ours.state()) == set(expected)
        for key, value in ours.state().items():
            torch.testing.assert_close(value, expected[key])
            assert not value.requires_grad


def test_an_average_starts_at_the_first_batch(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch()
    values = []
    for momentum in (0.0, 0.9):
        align = Alignment(small.model, momentum=momentum, conv=conv, patch=8)
        values.append(align(x).mismatch)
    assert torch.equal(*values)


def test_matching_statistics_give_zero_mismatch_and_zero_gradient(small):
    x = batch()
    seen = inputs_of(small.model, x.detach())
    convs = [conv_statistics(value, 8) for layer, value in seen if isinstance(layer, nn.Conv2d)]
    target = {f"{n}.{key}": value for n, values in enumerate(convs) for key, value in values.items()}
    align = Alignment(small.model, conv=target, patch=8, momentum=0.4, first_bn_multiplier=0.0)
    for _ in range(3):
        aligned = align(x)
        (gradient,) = torch.autograd.grad(aligned.mismatch, x)
        assert aligned.mismatch.item() < 1e-5
        assert bool(gradient.isfinite().all())
    align = Alignment(small.model, conv=target, patch=8, first_bn_multiplier=0.0)
    aligned = align(x)
    assert aligned.mismatch.item() == 0
    assert float(torch.autograd.grad(aligned.mismatch, x)[0].abs().max()) == 0


def test_alternating_teachers_have_separate_averages(tiny_teachers, tiny_images):
    names = NETS[:2]
    alone, turns = {}, {}
    convs = {name: gathered(tiny_teachers[name], tiny_images) for name in names}

    def make(name):
        return Alignment(tiny_teachers[name].model, momentum=0.4, conv=convs[name], patch=8)

    def ask(align, name, seed):
        return align(tiny_teachers[name].prepare(batch(seed=seed))).mismatch.detach()

    for start, name in enumerate(names):
        align = make(name)
        alone[name] = [ask(align, name, seed) for seed in range(start, 6, 2)]
    both = {name: make(name) for name in names}
    for seed in range(6):
        name = names[seed % 2]
        turns.setdefault(name, []).append(ask(both[name], name, seed))
        assert bool(both[names[1]].state()) == (seed > 0)
    assert all(torch.equal(a, b) for name in names for a, b in zip(alone[name], turns[name], strict=True))


def test_a_failed_pass_changes_no_average(small, tiny_images):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.wrong = copy.deepcopy(small.model), False

        def forward(self, x):
            found = self.inner(x)
            if self.wrong:
                raise OSError("gone")
            return found

    model = Broken().eval()
    align = Alignment(model, momentum=0.4, conv=gathered(small, tiny_images), patch=8)
    align(batch())
    before = align.state()
    model.wrong = True
    with pytest.raises(OSError, match="gone"):
        align(batch(seed=1))
    assert same(align.state(), before)
    model.wrong = False
    align(batch(seed=1))
    assert not same(align.state(), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


# -- dropping convolutions ----------------------------------------------------------------------------------------------


def dropping(small, conv, drop, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = {"patch": 8} | settings
    return Alignment(small.model, conv=conv, drop=drop, generator=generator, **settings), generator


def took_part(align, x):
    """Return the convolutions that took part: those with changed averages."""
    before = align.state()
    align(x)
    keys = [f"conv.{n}.patch_mean" for n in range(3)]
    after = align.state()
    return torch.tensor([key in after and not (key in before and torch.equal(after[key], before[key])) for key in keys])


def test_convolutions_are_dropped_at_random_and_keep_their_averages(small, tiny_images):
    align, generator = dropping(small, gathered(small, tiny_images, patch=16), 0.3, momentum=0.4, patch=16)
    kept = torch.stack([took_part(align, batch(seed=seed)) for seed in range(300)])
    assert abs(float(kept.float().mean()) - 0.7) < 0.05
    assert bool((kept.float().mean(0) < 0.8).all())
    again = torch.Generator().manual_seed(0)
    assert torch.equal(kept, torch.stack([torch.rand(3, generator=again) >= 0.3 for _ in range(300)]))
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_dropped_convolution_has_no_term_but_counts_as_a_layer(small, tiny_images, reduction):
    conv, x = gathered(small, tiny_images), batch()
    kept = torch.rand(3, generator=torch.Generator().manual_seed(16)) >= 0.5
    assert kept.tolist() == [False, True, True]
    align, _ = dropping(small, conv, 0.5, seed=16, reduction=reduction)
    ours, expected = align(x).mismatch, Alignment(small.model)(x).mismatch
    convs = [value for layer, value in inputs_of(small.model, x) if isinstance(layer, nn.Conv2d)]
    for number in (1, 2):
        for key, value in conv_statistics(convs[number], 8).items():
            expected = expected + (value - conv[f"{number}.{key}"]).norm()
    torch.testing.assert_close(ours, expected / (4 if reduction == "mean" else 1))


def test_each_pass_always_draws_one_number_per_convolution(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch()
    states = []
    for drop, head in ((0.0, True), (0.0, False), (0.5, False), (0.9, True)):
        align, generator = dropping(small, conv, drop)
        for _ in range(3):
            align(x, head=head)
        states.append(generator.get_state())
    expected = torch.Generator().manual_seed(0)
    torch.rand(9, generator=expected)
    assert all(torch.equal(state, expected.get_state()) for state in states)
    with pytest.raises(AssertionError, match="generator"):
        Alignment(small.model, conv=conv, patch=8, drop=0.1)


# -- resuming -----------------------------------------------------------------------------------------------------------


@every_net
def test_resuming_from_a_state_gives_the_same_bits(tiny_teachers, tiny_images, tmp_path, name):
    teacher, settings = tiny_teachers[name], {"momentum": 0.4, "patch": 8, "drop": 0.3}
    conv = gathered(teacher, tiny_images)

    def ask(align, seed):
        x = teacher.prepare(batch(seed=seed)).detach().requires_grad_()
        mismatch = align(x, head=False).mismatch
        return mismatch.detach(), torch.autograd.grad(mismatch, x)[0]

    generator = torch.Generator().manual_seed(1)
    align = Alignment(teacher.model, conv=conv, generator=generator, **settings)
    assert align.state() == {}
    plain = [ask(align, seed) for seed in range(2)]
    write_tensors(Artifact(tmp_path / "state", "k"), align.state() | {"generator": generator.get_state()})
    plain += [ask(align, seed) for seed in range(2, 4)]
    last = align.state()
    kept = read_tensors(tmp_path / "state")
    generator = torch.Generator()
    generator.set_state(kept.pop("generator"))
    align = Alignment(teacher.model, conv=conv, generator=generator, **settings)
    align.restore(kept)
    assert same(align.state(), kept)
    resumed = [ask(align, seed) for seed in range(2, 4)]
    for ours, theirs in zip(resumed, plain[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same(align.state(), last)
    assert not torch.equal(plain[0][0], plain[2][0])


def test_later_passes_do_not_change_a_state(small, tiny_images):
    align = Alignment(small.model, momentum=0.4, conv=gathered(small, tiny_images), patch=8)
    align(batch())
    kept = align.state()
    copies = {key: value.clone() for key, value in kept.items()}
    align(batch(seed=1))
    assert same(kept, copies)
    assert not same(kept, align.state())


# -- the pass -----------------------------------------------------------------------------------------------------------


@every_net
def test_head_is_skipped_with_convolutions_too(tiny_teachers, tiny_images, name):
    teacher, runs = tiny_teachers[name], []
    x = teacher.prepare(batch()).detach().requires_grad_()
    handle = teacher.model.get_classifier().register_forward_hook(lambda *_: runs.append(1))
    results = []
    try:
        conv = gathered(teacher, tiny_images)
        runs.clear()
        align = Alignment(teacher.model, conv=conv, patch=8)
        for head in (False, False, True, False):
            aligned = align(x, head=head)
            results.append((aligned, torch.autograd.grad(aligned.mismatch, x)[0], len(runs)))
    finally:
        handle.remove()
    assert [count for *_, count in results] == [1, 1, 2, 2]
    assert [aligned.logits is not None for aligned, *_ in results] == [False, False, True, False]
    assert all(torch.equal(aligned.mismatch, results[0][0].mismatch) for aligned, *_ in results)
    assert all(torch.equal(gradient, results[0][1]) for _, gradient, _ in results)
    assert torch.equal(results[2][0].logits, teacher.model(x))


def test_a_convolution_after_the_last_norm_counts_even_without_the_head(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch()
    align = Alignment(small.model, conv=conv, patch=8, momentum=0.4)
    first, second = align(x, head=False).mismatch, align(x, head=False).mismatch
    assert "conv.2.patch_var" in align.state()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_the_network_may_be_called_otherwise_inside_the_block(small, tiny_images):
    conv, x, other = gathered(small, tiny_images), batch(), batch(seed=1)
    values = []
    for asked in (False, True):
        align = Alignment(small.model, conv=conv, patch=8, momentum=0.4)
        align(x, head=False)
        if asked:
            assert small.model(other).shape == (4, 4)
        values.append((align(other, head=False).mismatch, align.state()))
    assert torch.equal(values[0][0], values[1][0])
    assert same(values[0][1], values[1][1])


def test_statistics_of_another_size_patch_or_network_give_a_one_line_error(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch()

    def error_of(conv, x=x, patch=8):
        with pytest.raises(TeacherError) as error:
            Alignment(small.model, conv=conv, patch=patch, name="abc")(x)
        assert "'abc'" in one_line(error)
        assert not any(m._forward_pre_hooks for m in small.model.modules())
        return str(error.value)

    assert "conv.0.patch_mean has 16 values, but the input has 9" in error_of(conv, batch(size=24))
    assert "conv.0.patch_mean has 16 values, but the input has 64" in error_of(conv, patch=4)
    more = conv | {f"3.{key}": conv[f"2.{key}"] for key in STATISTICS}
    assert "expected 4 convolutions, 3 ran" in error_of(more)
    fewer = {key: value for key, value in conv.items() if not key.startswith("2.")}
    assert "expected 2 convolutions, more ran" in error_of(fewer)
    wider = conv | {"1.channel_mean": torch.zeros(5), "1.channel_var": torch.zeros(5)}
    assert "conv.1.channel_mean has 5 values, but the input has 4" in error_of(wider)


class Shifted(nn.BatchNorm2d):
    """A BN layer with a `forward` of its own."""

    def forward(self, x):
        return super().forward(x + 1) * 2


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d, Shifted])
def test_the_output_of_every_kind_of_layer_is_that_of_the_layer(kind):
    torch.manual_seed(0)
    layer = kind(3).eval().requires_grad_(False)
    layer.running_mean, layer.running_var = torch.randn(3), torch.rand(3) + 0.5
    layer.weight.copy_(torch.randn(3))
    x = batch().detach().requires_grad_()
    align = Alignment(nn.Sequential(layer))
    ours = align(x).logits
    expected = layer(x)
    assert torch.equal(ours, expected)
    weights = torch.randn(expected.shape)
    (gradient,), (native,) = (torch.autograd.grad((y * weights).sum(), x) for y in (ours, expected))
    torch.testing.assert_close(gradient, native)


# -- BN layers of other kinds -----------------------------------------------------------------------------------------


def biased(x):
    """Return mean and biased variance per channel of (B, C) or (B, C, ...), one number at a time."""
    per_channel = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    means = [sum(row.tolist()) / len(row) for row in per_channel]
    spreads = [sum((v - m) ** 2 for v in row.tolist()) / len(row) for row, m in zip(per_channel, means, strict=True)]
    return torch.tensor(means), torch.tensor(spreads)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (6, 3)),
        (nn.BatchNorm1d(3), (4, 3, 5)),
        (nn.BatchNorm2d(3), (4, 3, 5, 2)),
        (nn.BatchNorm3d(3), (2, 3, 4, 2, 3)),
        (nn.SyncBatchNorm(3), (4, 3, 5, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(len(value)),
)
def test_every_kind_of_batch_norm_is_matched(layer, shape):
    generator = torch.Generator().manual_seed(0)
    layer = layer.eval().requires_grad_(False)
    layer.running_mean = torch.randn(3, generator=generator)
    layer.running_var = torch.rand(3, generator=generator) + 0.5
    x = torch.randn(shape, generator=generator)
    alignment = Alignment(nn.Sequential(layer), first_bn_multiplier=2.0)
    found = alignment(x).mismatch
    mean, var = biased(x)
    expected = 2 * ((mean - layer.running_mean).norm() + (var - layer.running_var).norm())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_layers_that_take_part_are_named():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.InstanceNorm2d(3))
    expected = "norm layers in BN alignment: 1 BatchNorm1d, 2 BatchNorm2d; not in it: 1 InstanceNorm2d, 1 LayerNorm"
    assert describe_norms(model) == expected
    levit = describe_norms(timm.create_model("levit_128s", num_classes=3))
    assert levit == "norm layers in BN alignment: 48 BatchNorm1d, 4 BatchNorm2d; not in it: none"


@pytest.mark.parametrize("architecture", ["repvgg_a0", "mobileone_s0"])
def test_folded_bn_layers_are_explained(architecture):
    from timm.utils.model import reparameterize_model

    with pytest.raises(TeacherError, match="folded into convolutions for deployment"):
        Alignment(reparameterize_model(timm.create_model(architecture)), name="x")
