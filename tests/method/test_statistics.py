import copy
import dataclasses
import json
import math
import threading

import pytest
import torch
from pipeline import one_line
from torch import nn

from prism_hf.errors import StoppedError, TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.method.alignment import BNAlignment
from prism_hf.method.statistics import (
    STATISTICS,
    MovingAlignment,
    channel_statistics,
    conv_statistics,
    gather_statistics,
    patch_statistics,
)
from prism_hf.run import statistics as keeping
from prism_hf.run.statistics import real_statistics
from prism_hf.runtime import stop as interruption
from prism_hf.runtime.store import is_sealed, seal_of
from prism_hf.runtime.tensors import read_tensors, write_tensors

NETS = ("test_resnet", "test_byobnet", "test_efficientnet")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
every_net = pytest.mark.parametrize("name", NETS)


# -- the slow, literal version ------------------------------------------------------------------------------------------


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
    """Every BN and convolution that runs, in order, with its input."""
    seen = []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(lambda m, i: seen.append((m, i[0]))) for layer in layers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class SlowMismatch:
    """R with plain loops; the gradient of a norm by hand: that of (unit vector of the difference) . (batch statistic)."""

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
                if norm:  # the inputs of some layers of byobnet are all zero
                    linear = linear + weight * (difference / norm * statistic).sum()
        count = norms + convs if self.reduction == "mean" else 1
        (gradient,) = torch.autograd.grad(linear / count, x)
        return value / count, gradient


# -- things to test with ------------------------------------------------------------------------------------------------


def batch(dtype=torch.float64, size=32, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 3, size, size), generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def map_of(*shape, dtype=torch.float64, seed=0):
    """A map whose channels and places differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    trend = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return (x * (1 + trend.abs()) + 2 * trend).to(dtype).requires_grad_()


def double(teacher):
    return dataclasses.replace(teacher, model=copy.deepcopy(teacher.model).double())


def close(a, b, tolerance):
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm()) < tolerance


def rows_of(images, asked=None):
    def read(rows):
        assert isinstance(rows, torch.Tensor)
        if asked is not None:
            asked.append(rows.tolist())
        return images[rows]

    return read


def gathered(teacher, images, patch=8, **settings):
    return gather_statistics(teacher, rows_of(images), len(images), patch=patch, **{"seed": 0, **settings})


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


class Small(nn.Module):
    """A convolution before, one after its norm, and the first of them again."""

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


@pytest.fixture
def small(tiny_teachers):
    return dataclasses.replace(tiny_teachers["test_resnet"], name="small", model=Small(), num_classes=4)


# -- statistics of one batch --------------------------------------------------------------------------------------------

SHAPES = [
    ((3, 5, 12, 18), 6),  # even cells
    ((3, 5, 7, 11), 3),  # cells that overlap: 2 x 3 of 7 x 11
    ((2, 4, 5, 9), 16),  # smaller than a patch: one cell
    ((2, 3, 31, 16), 16),  # one cell of almost two patches
    ((4, 6, 1, 1), 16),  # squeeze and excite
    ((2, 3, 3, 4), 1),  # a cell per pixel
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "patch"), SHAPES, ids=str)
def test_statistics_are_their_definition(shape, patch, dtype, layout):
    x = map_of(*shape, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
    y = x.detach().double().requires_grad_()
    ours, slow = conv_statistics(x, patch), slow_conv(y, patch)
    assert tuple(ours) == STATISTICS
    for number, key in enumerate(STATISTICS):
        assert ours[key].dtype == dtype
        assert ours[key].shape == slow[key].shape
        assert close(ours[key], slow[key], TOLERANCE[dtype]), key
        weights = torch.randn(len(slow[key]), dtype=torch.float64) + number
        (gradient,) = torch.autograd.grad((ours[key] * weights.to(dtype)).sum(), x, retain_graph=True)
        (literal,) = torch.autograd.grad((slow[key] * weights).sum(), y, retain_graph=True)
        assert close(gradient, literal, TOLERANCE[dtype]), key
        assert gradient.is_contiguous(memory_format=layout)


def test_statistics_pass_gradcheck():
    x = map_of(2, 3, 5, 7)
    assert torch.autograd.gradcheck(channel_statistics, x)
    assert torch.autograd.gradcheck(lambda t: patch_statistics(t, 2), x)


@pytest.mark.parametrize("side", range(1, 40))
def test_cells_are_cut_as_adaptive_average_pooling_cuts(side):
    x, cells = torch.rand(2, 3, side, 20, dtype=torch.float64), (max(1, side // 7), 2)
    expected = nn.functional.adaptive_avg_pool2d(x, cells).mean((0, 1)).flatten()
    torch.testing.assert_close(patch_statistics(x, 7)[0], expected)


def test_a_mean_far_from_zero_costs_no_digits():
    """E[x^2] - E[x]^2 in float32 would be off by several percent here."""
    x = (map_of(4, 5, 12, 12).detach() * 0.3 + 1000).float()
    ours, exact = conv_statistics(x, 4), slow_conv(x.double(), 4)
    for key in STATISTICS:
        assert close(ours[key], exact[key], 1e-4), key


def test_a_cell_of_equal_values_has_no_variance():
    x = torch.full((2, 3, 8, 8), 0.3)
    x[..., 4:] = 700.0
    mean, var = patch_statistics(x, 4)
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
        (gradient,) = torch.autograd.grad(ours[key].square().sum(), x, retain_graph=True)
        (literal,) = torch.autograd.grad(slow[key].square().sum(), wide, retain_graph=True)
        assert gradient.dtype == torch.bfloat16
        assert close(gradient, literal, 0.02), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_an_activation_is_saved(dtype):
    x = map_of(4, 5, 6, 6).detach().to(dtype).requires_grad_()
    for mean, _ in (channel_statistics(x), patch_statistics(x, 3)):
        large = [t for t in mean.grad_fn.saved_tensors if t.numel() > 5]
        assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]


def test_channels_do_not_see_places_and_cells_do_not_see_channels():
    x = map_of(3, 4, 8, 8).detach()
    by_place, by_channel = x.flip(0).permute(0, 1, 3, 2), x[:, [2, 0, 3, 1]]
    torch.testing.assert_close(channel_statistics(x), channel_statistics(by_place))
    torch.testing.assert_close(patch_statistics(x, 4), patch_statistics(by_channel, 4))
    assert not torch.allclose(patch_statistics(x, 4)[0], patch_statistics(x.flip(2), 4)[0])


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


def test_every_image_is_asked_for_once_in_an_order_of_the_seed(small, tiny_images):
    asked = {seed: [] for seed in (0, 1)}
    for seed, rows in asked.items():
        gather_statistics(small, rows_of(tiny_images, rows), 7, patch=8, seed=seed, batch_size=3)
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


def test_the_same_call_gives_the_same_bits_and_leaves_global_random_numbers_alone(small, tiny_images):
    before = torch.get_rng_state()
    assert same(gathered(small, tiny_images, batch_size=2), gathered(small, tiny_images, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(gathered(small, tiny_images), gathered(small, tiny_images, batch_size=250))


def test_layers_are_counted_as_they_run_and_again_when_they_run_again(small, tiny_images):
    found = gathered(small, tiny_images, patch=8)
    assert list(found) == [f"{n}.{key}" for n in range(3) for key in STATISTICS]
    assert [len(found[f"{n}.channel_mean"]) for n in range(3)] == [3, 4, 4]
    assert [len(found[f"{n}.patch_var"]) for n in range(3)] == [16, 1, 1]
    assert not torch.equal(found["1.channel_mean"], found["2.channel_mean"])


def test_no_graph_is_kept_and_no_hook_stays(small, tiny_images):
    assert not any(value.requires_grad for value in gathered(small, tiny_images).values())

    def broken(rows):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        gather_statistics(small, broken, 7, patch=8, seed=0)
    assert not any(m._forward_pre_hooks for m in small.model.modules())


def test_a_network_without_convolutions_has_no_statistics(small, tiny_images):
    flat = dataclasses.replace(small, name="flat", model=nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)))
    with pytest.raises(TeacherError) as error:
        gathered(flat, tiny_images)
    assert "'flat' has no Conv2d" in one_line(error)


def test_gathering_stops_when_it_is_asked_to(small, tiny_images):
    interruption._wanted.set()
    try:
        with pytest.raises(StoppedError):
            gathered(small, tiny_images)
    finally:
        interruption._wanted.clear()


# -- kept on the disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keep(small, tiny_images, tmp_path):
    """Ask for the statistics; gives them, and in how many passes over the data they were made."""

    def ask(teacher=small, images=tiny_images, count=7, content="abc", patch=8, seed=0):
        asked = []
        images = rows_of(images, asked)
        found = real_statistics(teacher, images, count, content, root=tmp_path, patch=patch, seed=seed)
        return found, sum(len(rows) for rows in asked if len(rows) > 1) / count

    return ask


def files(folder):
    return sorted(folder.glob("statistics/*/conv.safetensors"))


def test_they_are_made_once(keep, small, tiny_images, tmp_path):
    first, passes = keep()
    assert passes == 1
    again, passes = keep()
    assert passes == 0
    assert same(first, again)
    assert same(first, gathered(small, tiny_images))
    (path,) = files(tmp_path)
    assert is_sealed(path)
    assert path.parent.name.startswith("test-resnet-")
    assert json.loads(seal_of(path).read_text())["notes"]["weights_sha256"] == small.weights_sha256


def test_everything_they_depend_on_makes_another_file(keep, small, tiny_images, tmp_path):
    keep()
    changes = [
        {"content": "abd"},
        {"patch": 4},
        {"count": 6},
        {"seed": 1},
        {"images": tiny_images[..., :30]},
        {"teacher": dataclasses.replace(small, weights_sha256="0" * 64)},
        {"teacher": dataclasses.replace(small, size=24)},
        {"teacher": dataclasses.replace(small, mean=(0.1, 0.1, 0.1))},
        {"teacher": dataclasses.replace(small, std=(0.1, 0.1, 0.1))},
        {"teacher": dataclasses.replace(small, architecture="Other/Net")},
    ]
    for number, change in enumerate(changes, 2):
        assert keep(**change)[1] == 1, change
        assert len(files(tmp_path)) == number, change
    assert any(path.parent.name.startswith("other-net-") for path in files(tmp_path))
    assert keep(teacher=dataclasses.replace(small, name="another name"))[1] == 0


def spoil(path, how):
    if how == "bytes":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "gone":
        path.unlink()
    elif how == "seal":
        seal_of(path).write_text("{}")
    elif how == "foreign":
        write_tensors(path, read_tensors(path), {"key": "of another"})


@pytest.mark.parametrize("how", ["bytes", "cut", "gone", "seal", "foreign"])
def test_a_damaged_or_foreign_file_is_set_aside_and_made_again(keep, tmp_path, caplog, how):
    first, _ = keep()
    (path,) = files(tmp_path)
    before = {key: value.clone() for key, value in first.items()}
    spoil(path, how)
    assert same(first, before)  # what is in use does not change with the file
    caplog.clear()
    again, passes = keep()
    assert passes == 1
    assert same(first, again)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert str(path) in line
    assert "set aside as conv.safetensors.aside-1" in line
    assert keep()[1] == 0


def test_an_unfinished_file_counts_as_not_there(keep, tmp_path):
    first, _ = keep()
    (path,) = files(tmp_path)
    seal_of(path).unlink()
    path.with_name(".draft-conv.safetensors-x").write_bytes(b"half")
    again, passes = keep()
    assert passes == 1
    assert same(first, again)
    assert not list(path.parent.glob(".draft-*"))


def test_two_that_want_it_at_once_get_one_and_the_same(keep, monkeypatch, tmp_path):
    made, results, inside = [], [], threading.Event()

    def slow(*args, **kwargs):
        made.append(1)
        inside.set()
        threading.Event().wait(0.3)
        return {"0.channel_mean": torch.full((3,), float(len(made)))}

    monkeypatch.setattr(keeping, "gather_statistics", slow)
    threads = [threading.Thread(target=lambda: results.append(keep()[0])) for _ in range(3)]
    threads[0].start()
    inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(results) == 3
    assert all(same(result, results[0]) for result in results)
    assert same(keep()[0], results[0])


# -- the mismatch -------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("first", [10.0, 0.5])
def test_without_averages_and_convolutions_it_is_bn_alignment(tiny_teachers, name, reduction, first):
    teacher, settings = tiny_teachers[name], {"reduction": reduction, "first_bn_multiplier": first}
    x = teacher.prepare(batch(torch.float32)).detach().requires_grad_()
    with BNAlignment(teacher.model, **settings) as align:
        plain = align(x)
    with MovingAlignment(teacher.model, **settings) as align:
        for _ in range(2):
            ours = align(x)
            torch.testing.assert_close(ours.mismatch, plain.mismatch, rtol=1e-6, atol=0)
            assert torch.equal(ours.logits, plain.logits)
            gradients = [torch.autograd.grad(a.mismatch, x, retain_graph=True)[0] for a in (ours, plain)]
            assert close(*gradients, 1e-6)
        assert align.state() == {}


@pytest.mark.parametrize(
    ("name", "momentum", "reduction", "first"),
    [(name, 0.4, "sum", 10.0) for name in NETS] + [("test_byobnet", 0.4, "mean", 1.0), ("test_byobnet", 0.0, "sum", 0.3)],
)
def test_it_is_the_equation_over_several_batches(tiny_teachers, tiny_images, name, momentum, reduction, first):
    teacher = double(tiny_teachers[name])
    conv = gathered(tiny_teachers[name], tiny_images)
    slow = SlowMismatch(teacher.model, momentum=momentum, conv=conv, patch=8, reduction=reduction, first=first)
    ours = MovingAlignment(
        teacher.model, momentum=momentum, conv=conv, patch=8, reduction=reduction, first_bn_multiplier=first
    )
    for seed in range(3):
        x = teacher.prepare(batch(seed=seed)).detach().requires_grad_()
        with ours:
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


def test_an_average_starts_from_the_first_batch(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch(torch.float32)
    values = []
    for momentum in (0.0, 0.9):
        with MovingAlignment(small.model, momentum=momentum, conv=conv, patch=8) as align:
            values.append(align(x).mismatch)
    assert torch.equal(*values)


def test_the_mismatch_is_zero_where_it_should_be_and_so_is_its_gradient(small):
    x = batch(torch.float32)
    seen = inputs_of(small.model, x.detach())
    convs = [conv_statistics(value, 8) for layer, value in seen if isinstance(layer, nn.Conv2d)]
    target = {f"{n}.{key}": value for n, values in enumerate(convs) for key, value in values.items()}
    with MovingAlignment(small.model, conv=target, patch=8, momentum=0.4, first_bn_multiplier=0.0) as align:
        for _ in range(3):
            aligned = align(x)
            (gradient,) = torch.autograd.grad(aligned.mismatch, x)
            assert aligned.mismatch.item() < 1e-5
            assert bool(gradient.isfinite().all())
    with MovingAlignment(small.model, conv=target, patch=8, first_bn_multiplier=0.0) as align:
        aligned = align(x)
    assert aligned.mismatch.item() == 0
    assert float(torch.autograd.grad(aligned.mismatch, x)[0].abs().max()) == 0


def test_teachers_that_take_turns_have_their_own_past(tiny_teachers, tiny_images):
    names = NETS[:2]
    alone, turns = {}, {}
    convs = {name: gathered(tiny_teachers[name], tiny_images) for name in names}

    def make(name):
        return MovingAlignment(tiny_teachers[name].model, momentum=0.4, conv=convs[name], patch=8)

    def ask(align, name, seed):
        with align:
            return align(tiny_teachers[name].prepare(batch(torch.float32, seed=seed))).mismatch.detach()

    for start, name in enumerate(names):
        align = make(name)
        alone[name] = [ask(align, name, seed) for seed in range(start, 6, 2)]
    both = {name: make(name) for name in names}
    for seed in range(6):
        name = names[seed % 2]
        turns.setdefault(name, []).append(ask(both[name], name, seed))
        assert bool(both[names[1]].state()) == (seed > 0)
    assert all(torch.equal(a, b) for name in names for a, b in zip(alone[name], turns[name], strict=True))


def test_a_pass_that_fails_moves_nothing(small, tiny_images):
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
    with MovingAlignment(model, momentum=0.4, conv=gathered(small, tiny_images), patch=8) as align:
        align(batch(torch.float32))
        before = align.state()
        model.wrong = True
        with pytest.raises(OSError, match="gone"):
            align(batch(torch.float32, seed=1))
        assert same(align.state(), before)
        model.wrong = False
        align(batch(torch.float32, seed=1))
        assert not same(align.state(), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


# -- leaving out --------------------------------------------------------------------------------------------------------


def dropping(small, conv, drop, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return MovingAlignment(small.model, conv=conv, patch=8, drop=drop, generator=generator, **settings), generator


def took_part(align, x):
    """Which convolutions did: those whose averages moved."""
    before = align.state()
    align(x)
    keys = [f"conv.{n}.patch_mean" for n in range(3)]
    return torch.tensor([align.state().get(key) is not before.get(key) for key in keys])


def test_convolutions_are_left_out_at_random_and_their_averages_stay(small, tiny_images):
    align, generator = dropping(small, gathered(small, tiny_images, patch=16), 0.3, momentum=0.4)
    align.patch = 16
    with align:
        kept = torch.stack([took_part(align, batch(torch.float32, seed=seed)) for seed in range(300)])
    assert abs(float(kept.float().mean()) - 0.7) < 0.05
    assert bool((kept.float().mean(0) < 0.8).all())
    again = torch.Generator().manual_seed(0)
    assert torch.equal(kept, torch.stack([torch.rand(3, generator=again) >= 0.3 for _ in range(300)]))
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_is_left_out_gives_no_term_but_counts_as_a_layer(small, tiny_images, reduction):
    conv, x = gathered(small, tiny_images), batch(torch.float32)
    kept = torch.rand(3, generator=torch.Generator().manual_seed(16)) >= 0.5
    assert kept.tolist() == [False, True, True]
    align, _ = dropping(small, conv, 0.5, seed=16, reduction=reduction)
    with align, BNAlignment(small.model) as plain:
        ours, expected = align(x).mismatch, plain(x).mismatch
    convs = [value for layer, value in inputs_of(small.model, x) if isinstance(layer, nn.Conv2d)]
    for number in (1, 2):
        for key, value in conv_statistics(convs[number], 8).items():
            expected = expected + (value - conv[f"{number}.{key}"]).norm()
    torch.testing.assert_close(ours, expected / (4 if reduction == "mean" else 1))


def test_one_number_is_drawn_per_convolution_and_pass_whatever_happens(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch(torch.float32)
    states = []
    for drop, head in ((0.0, True), (0.0, False), (0.5, False), (0.9, True)):
        align, generator = dropping(small, conv, drop)
        with align:
            for _ in range(3):
                align(x, head=head)
        states.append(generator.get_state())
    expected = torch.Generator().manual_seed(0)
    torch.rand(9, generator=expected)
    assert all(torch.equal(state, expected.get_state()) for state in states)
    with pytest.raises(AssertionError, match="generator"):
        MovingAlignment(small.model, conv=conv, patch=8, drop=0.1)


# -- going on -----------------------------------------------------------------------------------------------------------


@every_net
def test_going_on_from_a_state_gives_the_same_bits(tiny_teachers, tiny_images, tmp_path, name):
    teacher, settings = tiny_teachers[name], {"momentum": 0.4, "patch": 8, "drop": 0.3}
    conv = gathered(teacher, tiny_images)

    def ask(align, seed):
        x = teacher.prepare(batch(torch.float32, seed=seed)).detach().requires_grad_()
        mismatch = align(x, head=False).mismatch
        return mismatch.detach(), torch.autograd.grad(mismatch, x)[0]

    generator = torch.Generator().manual_seed(1)
    with MovingAlignment(teacher.model, conv=conv, generator=generator, **settings) as align:
        assert align.state() == {}
        plain = [ask(align, seed) for seed in range(2)]
        write_tensors(tmp_path / "state", align.state() | {"generator": generator.get_state()}, {})
        plain += [ask(align, seed) for seed in range(2, 4)]
        last = align.state()
    kept = read_tensors(tmp_path / "state")
    generator = torch.Generator()
    generator.set_state(kept.pop("generator"))
    with MovingAlignment(teacher.model, conv=conv, generator=generator, **settings) as align:
        align.restore(kept)
        assert same(align.state(), kept)
        resumed = [ask(align, seed) for seed in range(2, 4)]
    for ours, theirs in zip(resumed, plain[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same(align.state(), last)
    assert not torch.equal(plain[0][0], plain[2][0])


def test_a_state_is_not_changed_by_what_comes_after(small, tiny_images):
    with MovingAlignment(small.model, momentum=0.4, conv=gathered(small, tiny_images), patch=8) as align:
        align(batch(torch.float32))
        kept = align.state()
        copies = {key: value.clone() for key, value in kept.items()}
        align(batch(torch.float32, seed=1))
    assert same(kept, copies)
    assert not same(kept, align.state())


# -- the pass -----------------------------------------------------------------------------------------------------------


@every_net
def test_head_is_skipped_from_the_second_call_on(tiny_teachers, tiny_images, name):
    teacher, runs = tiny_teachers[name], []
    x = teacher.prepare(batch(torch.float32)).detach().requires_grad_()
    handle = teacher.model.get_classifier().register_forward_hook(lambda *_: runs.append(1))
    results = []
    try:
        conv = gathered(teacher, tiny_images)
        runs.clear()
        with MovingAlignment(teacher.model, conv=conv, patch=8) as align:
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


def test_a_convolution_after_the_last_norm_is_still_seen_without_the_head(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch(torch.float32)
    with MovingAlignment(small.model, conv=conv, patch=8, momentum=0.4) as align:
        first, second = align(x, head=False).mismatch, align(x, head=False).mismatch
        assert "conv.2.patch_var" in align.state()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_the_network_may_be_asked_for_something_else_inside_the_block(small, tiny_images):
    conv, x, other = gathered(small, tiny_images), batch(torch.float32), batch(torch.float32, seed=1)
    values = []
    for asked in (False, True):
        with MovingAlignment(small.model, conv=conv, patch=8, momentum=0.4) as align:
            align(x, head=False)
            if asked:
                assert small.model(other).shape == (4, 4)
            values.append((align(other, head=False).mismatch, align.state()))
    assert torch.equal(values[0][0], values[1][0])
    assert same(values[0][1], values[1][1])


def test_hooks_are_gone_after_the_block(small, tiny_images):
    def hooks():
        return sum(len(m._forward_pre_hooks) for m in small.model.modules())

    x = batch(torch.float32)
    with MovingAlignment(small.model, conv=gathered(small, tiny_images), patch=8) as align:
        assert hooks() == 3
        align(x)
    assert hooks() == 0
    with MovingAlignment(small.model, momentum=0.4):
        assert hooks() == 1
    with pytest.raises(AssertionError, match="with"):
        align(x)


def test_a_network_with_no_norm_is_the_error_of_bn_alignment():
    with pytest.raises(TeacherError, match="'alexnet' has no BatchNorm2d layer with running statistics"):
        MovingAlignment(nn.Sequential(nn.Conv2d(3, 4, 3)), name="alexnet")


def test_statistics_of_another_size_patch_or_network_are_one_line(small, tiny_images):
    conv, x = gathered(small, tiny_images), batch(torch.float32)

    def error_of(conv, x=x, patch=8):
        with (
            pytest.raises(TeacherError) as error,
            MovingAlignment(small.model, conv=conv, patch=patch, name="abc") as align,
        ):
            align(x)
        assert "'abc'" in one_line(error)
        assert not any(m._forward_pre_hooks for m in small.model.modules())
        return str(error.value)

    assert "conv.0.patch_mean has 16 numbers, the input gives 9" in error_of(conv, batch(torch.float32, size=24))
    assert "conv.0.patch_mean has 16 numbers, the input gives 64" in error_of(conv, patch=4)
    more = conv | {f"3.{key}": conv[f"2.{key}"] for key in STATISTICS}
    assert "there are 4, and 3 convolutions ran" in error_of(more)
    fewer = {key: value for key, value in conv.items() if not key.startswith("2.")}
    assert "there are 2, and more convolutions ran" in error_of(fewer)
    wider = conv | {"1.channel_mean": torch.zeros(5), "1.channel_var": torch.zeros(5)}
    assert "conv.1.channel_mean has 5 numbers, the input gives 4" in error_of(wider)
