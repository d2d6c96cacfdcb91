import pytest
import torch
from torch import nn

from prism_hf.errors import TeacherError
from prism_hf.method.alignment import BNAlignment, channel_mismatch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def batch(dtype=torch.float32, size=32, seed=0):
    x = torch.randn((4, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


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


def close(a, b, tolerance):
    return float((a - b).detach().norm() / b.detach().norm()) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_channel_mismatch_is_the_formula(dtype, layout):
    layer = norm_layer(dtype=dtype)
    x = torch.randn(4, 5, 6, 7, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, slow = channel_mismatch(x, layer), slow_mismatch(y, layer)
    (3 * ours).backward()
    (3 * slow).backward()
    assert close(ours, slow, TOLERANCE[dtype])
    assert close(x.grad, y.grad, TOLERANCE[dtype])
    assert x.grad.is_contiguous(memory_format=layout)


def test_channel_mismatch_passes_gradcheck():
    layer = norm_layer()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: channel_mismatch(t, layer), x)


def test_half_precision_is_reduced_in_float32():
    layer = norm_layer(dtype=torch.float32)
    x = (torch.randn(4, 5, 6, 6) * 3 + 2).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    ours, slow = channel_mismatch(x, layer), slow_mismatch(wide, layer)
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
    assert float(channel_mismatch(x, layer)) < 1e-12
    assert float(channel_mismatch(x + 0.1, layer)) > 0.1
    assert float(channel_mismatch(x * 1.1, layer)) > 0.1


@pytest.mark.parametrize("exact", ["mean and var", "mean", "var"])
def test_a_norm_of_exactly_zero_has_gradient_zero(exact):
    layer = norm_layer(channels=2)
    x = torch.tensor([0.5, -2.0], dtype=torch.float64).view(1, 2, 1, 1).repeat(3, 1, 4, 4).requires_grad_()
    if "mean" in exact:
        layer.running_mean.copy_(torch.tensor([0.5, -2.0]))
    if "var" in exact:
        layer.running_var.zero_()
    value = channel_mismatch(x, layer)
    value.backward()
    assert bool(x.grad.isfinite().all())
    # The variance of a constant does not move to first order: only a mean that is off leaves a gradient.
    assert bool((x.grad != 0).any()) == ("mean" not in exact)
    assert (value.item() == 0) == (exact == "mean and var")


def test_mismatch_does_not_depend_on_where_a_value_stands():
    layer, x = norm_layer(), torch.randn(4, 5, 6, 6, dtype=torch.float64)
    shuffled = x.flip(0).permute(0, 1, 3, 2)
    torch.testing.assert_close(channel_mismatch(x, layer), channel_mismatch(shuffled, layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_an_activation_is_saved(dtype):
    x = torch.randn(4, 5, 6, 6).to(dtype).requires_grad_()
    saved = channel_mismatch(x, norm_layer(dtype=torch.float32)).grad_fn.saved_tensors
    large = [t for t in saved if t.numel() > 5]
    assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_hooks_are_gone_after_the_block(tiny_teachers, name):
    teacher = tiny_teachers[name]

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in teacher.model.modules())

    before = hooks()
    x = teacher.prepare(batch().detach())
    with BNAlignment(teacher.model) as align:
        inside = hooks()
        align(x, head=False)
    assert inside > before
    assert hooks() == before
    with pytest.raises(RuntimeError), BNAlignment(teacher.model) as align:
        align(x[:, :2])
    assert hooks() == before
    with pytest.raises(AssertionError, match="with"):
        align(x)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_head_is_skipped_from_the_second_call_on(tiny_teachers, name, reduction):
    teacher, runs = tiny_teachers[name], []
    x = teacher.prepare(batch()).detach().requires_grad_()
    handle = teacher.model.get_classifier().register_forward_hook(lambda *_: runs.append(1))
    results = []
    try:
        with BNAlignment(teacher.model, reduction=reduction) as align:
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
    with BNAlignment(teacher.model) as align:
        first, second = align(x, head=False), align(x, head=False)
    assert first.logits is None
    assert torch.equal(first.mismatch, second.mismatch)


def test_first_layer_is_the_first_that_runs_not_the_first_that_is_registered():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.start = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.last(self.start(x) * 2).mean((2, 3))

    model, x = Backwards().eval().requires_grad_(False), batch().detach()
    with BNAlignment(model, first_bn_multiplier=10.0) as align:
        ours = align(x).mismatch
    expected = 10 * slow_mismatch(x, model.start) + slow_mismatch(model.start(x) * 2, model.last)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
    ],
    ids=["no norm", "1d norm", "no running statistics"],
)
def test_a_network_with_nothing_to_align_is_an_error(model):
    with pytest.raises(TeacherError, match="'alexnet' has no BatchNorm2d layer with running statistics") as error:
        BNAlignment(model, name="alexnet")
    assert "teachers.bn_pool" in str(error.value)
