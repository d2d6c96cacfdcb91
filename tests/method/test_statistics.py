import dataclasses

import pytest
import torch
from each import each
from pipeline import one_line
from slow_statistics import (
    NETS,
    TOLERANCE,
    close,
    double,
    gathered,
    inputs_of,
    map_of,
    same,
    slow_conv,
    small_teacher,
)
from torch import nn

from prism_hf.errors import TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.method.moments import EXACT, Targets, cell_statistics, channel_statistics, conv_moments, distance
from prism_hf.method.statistics import (
    STATISTICS,
    conv_statistics,
    gather_statistics,
    shuffled_batches,
)

every_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture
def small(tiny_teachers):
    return small_teacher(tiny_teachers["test_resnet"])


# -- statistics of one batch --------------------------------------------------------------------------------------------

SHAPES = [
    ((3, 5, 12, 18), 6),  # even cells
    ((3, 5, 7, 11), 3),  # overlapping cells: 2 x 3 of 7 x 11
    ((2, 4, 5, 9), 16),  # smaller than a patch: one cell
    ((2, 3, 31, 16), 16),  # one cell almost two patches high
    ((4, 6, 1, 1), 16),  # squeeze-and-excitation
    ((2, 3, 3, 4), 1),  # a cell per pixel
]


def distance_to(x, patch, target):
    """Return R of a convolution's input, as the product computes it."""
    batch = conv_moments(x, patch)
    targets = [(target[f"{part}_mean"], target[f"{part}_var"]) for part in ("channel", "patch")]
    return distance(batch, Targets.of(batch, targets, [1.0, 0.5]))


def slow_distance(x, patch, target):
    """Return the same from the definition."""
    norms = {key: (value - target[key].double()).norm() for key, value in slow_conv(x, patch).items()}
    return norms["channel_mean"] + norms["channel_var"] + 0.5 * (norms["patch_mean"] + norms["patch_var"])


def far_from(statistics):
    generator = torch.Generator().manual_seed(0)
    return {k: v + torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for k, v in statistics.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "patch"), SHAPES, ids=str)
def test_statistics_and_the_gradient_of_their_distance_equal_their_definition(shape, patch, dtype, layout):
    x = map_of(*shape, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
    y = x.detach().double().requires_grad_()
    ours, slow = conv_statistics(x, patch), slow_conv(y, patch)
    assert tuple(ours) == STATISTICS
    for key in STATISTICS:
        assert ours[key].dtype == dtype
        assert ours[key].shape == slow[key].shape
        assert close(ours[key], slow[key], TOLERANCE[dtype]), key
    target = far_from(ours)
    found, expected = distance_to(x, patch, target), slow_distance(y, patch, target)
    assert close(found, expected, TOLERANCE[dtype])
    (gradient,) = torch.autograd.grad(3 * found, x)
    (literal,) = torch.autograd.grad(3 * expected, y)
    assert close(gradient, literal, TOLERANCE[dtype])
    assert gradient.is_contiguous(memory_format=layout)


def test_the_distance_passes_gradcheck():
    x = map_of(2, 3, 5, 7)
    target = far_from(conv_statistics(x, 2))
    assert torch.autograd.gradcheck(lambda t: distance_to(t, 2, target), x)


@each("rows", [1, 100, EXACT // 64, EXACT // 64 + 1, 400])
def test_channel_statistics_are_exact_for_small_and_large_maps(rows):
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, 3, 8, 8, generator=generator) * 2 + torch.tensor([0.0, 3.0, 60.0]).view(1, 3, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    ours = channel_statistics(x)
    assert float(((ours[1] - var) / var).abs().max()) < 5e-6
    assert float(((ours[0] - mean) / var.sqrt()).abs().max()) < 1e-4


@each("side", range(1, 40))
def test_cells_have_the_bounds_of_adaptive_average_pooling(side):
    x, cells = torch.rand(2, 3, side, 20, dtype=torch.float64), (max(1, side // 7), 2)
    expected = nn.functional.adaptive_avg_pool2d(x, cells).mean((0, 1)).flatten()
    torch.testing.assert_close(cell_statistics(x, 7)[0].flatten(), expected)


def test_a_mean_far_from_zero_does_not_reduce_precision():
    """E[x^2] - E[x]^2 in float32 would be off by several percent here."""
    x = (map_of(4, 5, 12, 12).detach() * 0.3 + 1000).float()
    ours, exact = conv_statistics(x, 4), slow_conv(x.double(), 4)
    for key in STATISTICS:
        assert close(ours[key], exact[key], 1e-4), key


def test_a_cell_of_equal_values_has_no_variance():
    x = torch.full((2, 3, 8, 8), 0.3)
    x[..., 4:] = 700.0
    mean, var = (value.flatten() for value in cell_statistics(x, 4))
    torch.testing.assert_close(mean, torch.tensor([0.3, 700, 0.3, 700]), rtol=1e-4, atol=1e-4)
    assert float(var.abs().max()) < 1e-6 * 700**2


def test_half_precision_and_autocast_are_reduced_in_float32():
    x = map_of(3, 5, 9, 9).detach().bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = conv_statistics(x, 4)
    slow = slow_conv(wide, 4)
    for key in STATISTICS:
        assert ours[key].dtype == torch.float32
        assert close(ours[key], slow[key], 1e-5), key
    target = far_from(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance_to(x, 4, target)
    (gradient,) = torch.autograd.grad(found, x)
    (literal,) = torch.autograd.grad(slow_distance(wide, 4, target), wide)
    assert gradient.dtype == torch.bfloat16
    assert close(gradient, literal, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_an_activation_is_saved(dtype):
    x = map_of(4, 5, 6, 6).detach().to(dtype).requires_grad_()
    channels, cells = conv_moments(x, 3)
    assert channels.mean.grad_fn is cells.mean.grad_fn
    large = [t for t in channels.mean.grad_fn.saved_tensors if t.numel() > 5]
    assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]


def test_channel_statistics_ignore_positions_and_cell_statistics_ignore_channels():
    x = map_of(3, 4, 8, 8).detach()
    by_place, by_channel = x.flip(0).permute(0, 1, 3, 2), x[:, [2, 0, 3, 1]]
    torch.testing.assert_close(channel_statistics(x), channel_statistics(by_place))
    torch.testing.assert_close(cell_statistics(x, 4), cell_statistics(by_channel, 4))
    assert not torch.allclose(cell_statistics(x, 4)[0], cell_statistics(x.flip(2), 4)[0])


# -- statistics of the real data ----------------------------------------------------------------------------------------


@every_net
def test_gathered_statistics_are_averages_of_batches(tiny_teachers, tiny_images, name):
    teacher, patch = tiny_teachers[name], 8
    found = gathered(teacher, tiny_images, patch, batch_size=3)
    order, wide, sums = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist(), double(teacher), {}
    for rows in (order[:3], order[3:6], order[6:]):
        x = wide.prepare(to_reference(tiny_images[rows])).double()
        convs = [seen for layer, seen in inputs_of(wide.model, x) if isinstance(layer, nn.Conv2d)]
        for number, seen in enumerate(convs):
            for key, value in slow_conv(seen, patch).items():
                sums[f"{number}.{key}"] = sums.get(f"{number}.{key}", 0) + value * len(rows) / 7
    assert list(found) == list(sums)
    assert len(found) == 4 * sum(isinstance(m, nn.Conv2d) for m in teacher.model.modules())
    for key, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), sums[key], rtol=1e-4, atol=1e-5, msg=key)


def test_every_image_is_read_once_in_an_order_set_by_the_seed(small, tiny_images):
    asked = {seed: [] for seed in (0, 1)}
    for seed, rows in asked.items():
        batches = shuffled_batches(
            lambda part, rows=rows: rows.append(part.tolist()) or tiny_images[part], 7, seed=seed, batch_size=3
        )
        assert torch.equal(torch.cat(list(batches)), tiny_images[sum(rows, [])])
        assert [len(part) for part in rows] == [3, 3, 1]
        assert sorted(sum(rows, [])) == list(range(7))
        assert sum(rows, []) == torch.randperm(7, generator=torch.Generator().manual_seed(seed)).tolist()
    assert asked[0] != asked[1]


def test_means_do_not_depend_on_the_order_and_the_size_of_batches(small, tiny_images):
    whole = gathered(small, tiny_images)
    for seed, size in ((0, 7), (3, 7), (1, 2), (2, 4)):
        part = gathered(small, tiny_images, seed=seed, batch_size=size)
        for key, value in whole.items():
            if key.endswith("mean") or size == 7:
                torch.testing.assert_close(part[key], value, rtol=1e-5, atol=1e-6)


def test_the_same_call_gives_the_same_bits_without_changing_global_randomness(small, tiny_images):
    before = torch.get_rng_state()
    assert same(gathered(small, tiny_images, batch_size=2), gathered(small, tiny_images, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(gathered(small, tiny_images), gathered(small, tiny_images, batch_size=250))


def test_layers_are_counted_each_time_they_run(small, tiny_images):
    found = gathered(small, tiny_images, patch=8)
    assert list(found) == [f"{n}.{key}" for n in range(3) for key in STATISTICS]
    assert [len(found[f"{n}.channel_mean"]) for n in range(3)] == [3, 4, 4]
    assert [len(found[f"{n}.patch_var"]) for n in range(3)] == [16, 1, 1]
    assert not torch.equal(found["1.channel_mean"], found["2.channel_mean"])


def test_no_graph_or_hook_is_kept(small, tiny_images):
    assert not any(value.requires_grad for value in gathered(small, tiny_images).values())

    def broken():
        yield tiny_images
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        gather_statistics(small, broken(), patch=8)
    assert not any(m._forward_pre_hooks for m in small.model.modules())


def test_a_network_without_convolutions_has_no_statistics(small, tiny_images):
    flat = dataclasses.replace(small, name="flat", model=nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)))
    with pytest.raises(TeacherError) as error:
        gathered(flat, tiny_images)
    assert "'flat' has no Conv2d" in one_line(error)
