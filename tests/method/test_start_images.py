import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_teacher
from pipeline import one_line
from real_images import image_split, source_data
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from prism_hf.errors import DataError, TeacherError
from prism_hf.images.pixels import reference_mean_std, to_reference
from prism_hf.images.views import draw_crop
from prism_hf.method import start_images as selection
from prism_hf.method.start_images import (
    check_candidates,
    choose_rows,
    choose_start_images,
    mosaics,
    nearest_to_centers,
    real_rows,
)
from prism_hf.recipe.synthesis import Mosaic, SynthesisRecipe
from prism_hf.runtime.seeds import derived_seed

COUNTS = (12, 9, 8)


def make_split(counts=COUNTS, *, size=32, channels=3, seed=0):
    """Smooth random images, classes shuffled over the rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    coarse = torch.rand((len(labels), channels, 5, 5), generator=generator)
    pixels = (F.interpolate(coarse, (size, size), mode="bilinear") * 255).round().to(torch.uint8)
    return image_split(pixels, labels)


@pytest.fixture(scope="module")
def split():
    return make_split()


@pytest.fixture(scope="module")
def teacher():
    return make_teacher("test_resnet")


def chosen(split, teacher, ipc, rule, *, seed=0):
    return choose_rows(source_data(split), teacher, SynthesisRecipe(ipc=ipc, init=rule), seed=seed)


def loss_of(teacher, image_uint8, label):
    """Return the loss of a single image."""
    with torch.no_grad():
        logits = teacher.logits(to_reference(image_uint8[None]))[0].double()
    return float(logits.logsumexp(0) - logits[label])


class Reader(nn.Module):
    """A teacher whose features are the mean of each channel, and whose logits are `weight @ features`."""

    def __init__(self, weight):
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight.data = weight

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def reader(split, weight=None):
    mean, std = (value.flatten().tolist() for value in reference_mean_std(split.channels))
    weight = torch.eye(3, split.channels) if weight is None else weight
    model = Reader(weight).requires_grad_(False)
    return dataclasses.replace(
        make_teacher("test_resnet", channels=split.channels), model=model, mean=tuple(mean), std=tuple(std), size=split.size
    )


# -- without a teacher --------------------------------------------------------------------------------------------------


def test_real_rows_by_index_are_the_first_of_each_class(split):
    data = source_data(split)
    rows = real_rows(data, 3, seed=0, by_index=True)
    expected = [np.flatnonzero(split.labels == label)[:3] for label in range(3)]
    assert rows.tolist() == np.concatenate(expected).tolist()
    assert rows.tolist() == real_rows(data, 3, seed=9, by_index=True).tolist()


def test_real_rows_at_random_are_seeded_distinct_and_nested(split):
    data, state = source_data(split), torch.get_rng_state()
    rows = real_rows(data, 5, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert rows.dtype == np.int64
    assert rows.tolist() == real_rows(data, 5, seed=0).tolist() != real_rows(data, 5, seed=1).tolist()
    assert split.labels[rows].tolist() == [label for label in range(3) for _ in range(5)]
    assert len(set(rows.tolist())) == 15
    assert rows.reshape(3, 5)[:, :2].tolist() == real_rows(data, 2, seed=0).reshape(3, 2).tolist()


def test_a_class_with_too_few_images_gives_a_one_line_error(split):
    data = source_data(split)
    for by_index in (False, True):
        assert len(real_rows(data, 8, seed=0, by_index=by_index)) == 24
        with pytest.raises(DataError) as error:
            real_rows(data, 9, seed=0, by_index=by_index)
        assert "class 'cat' has 8 training images, but ipc is 9; lower ipc" in one_line(error)


# -- whole images chosen by a teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["real_median", "real_kmeans"])
@pytest.mark.parametrize("ipc", [1, 3, 8])
def test_rows_belong_to_their_class_in_order_without_repeats(split, teacher, rule, ipc):
    rows = chosen(split, teacher, ipc, rule)
    assert rows.dtype == np.int64
    assert split.labels[rows].tolist() == [label for label in range(3) for _ in range(ipc)]
    assert len(set(rows.tolist())) == 3 * ipc
    if ipc == 8:
        assert set(rows[16:]) == set(np.flatnonzero(split.labels == 2)), (
            "all images of a class with exactly ipc images are taken"
        )
    assert np.array_equal(rows, chosen(split, teacher, ipc, rule))


@pytest.mark.parametrize("rule", ["real_median", "real_kmeans"])
def test_a_class_that_is_too_small_gives_a_one_line_error(split, teacher, rule):
    with pytest.raises(DataError, match="class 'cat' has 8 training images, but ipc is 9; lower ipc"):
        chosen(split, teacher, 9, rule)


def test_median_rows_have_the_losses_nearest_to_the_median(split, teacher, monkeypatch):
    monkeypatch.setattr(selection, "_BATCH", 5)
    rows = chosen(split, teacher, 4, "real_median").reshape(3, 4)
    for label, own in enumerate(split.rows_by_class(3)):
        losses = {row: loss_of(teacher, split.images([row])[0], label) for row in own.tolist()}
        ordered = sorted(losses.values())
        middle = (ordered[(len(own) - 1) // 2] + ordered[len(own) // 2]) / 2
        distance = {row: abs(loss - middle) for row, loss in losses.items()}
        found = [distance[row] for row in rows[label].tolist()]
        assert found == pytest.approx(sorted(distance.values())[:4], abs=1e-5)
        assert found == pytest.approx(sorted(found), abs=1e-5)


def test_ties_at_the_median_are_broken_by_row(split, monkeypatch):
    monkeypatch.setattr(selection, "_losses", lambda split, rows, *_: (np.arange(len(rows)) % 3).astype(float))
    rows = chosen(split, None, 5, "real_median")
    own = split.rows_by_class(3)[0]  # 0 1 2 0 1 2 ...: the median is 1
    assert rows[:5].tolist() == own[[1, 4, 7, 10, 0]].tolist()


def test_the_two_middle_images_of_an_even_class_are_tied(monkeypatch):
    even = make_split((8, 8, 8))
    own = even.rows_by_class(3)
    for seed in range(50):
        losses = np.random.default_rng(seed).random(8).astype(np.float32).astype(np.float64)
        monkeypatch.setattr(selection, "_losses", lambda *_, losses=losses: losses)
        middle = sorted(np.argsort(losses)[3:5].tolist())
        assert chosen(even, None, 2, "real_median").tolist() == np.concatenate([rows[middle] for rows in own]).tolist()


def clusters(sizes, *, spread=0.01, seed=0):
    """Return shuffled points around distant corners, and the corner of each point."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    corners = 10 * np.eye(len(sizes))
    return corners[group] + spread * random.standard_normal((len(group), len(sizes))), group


@pytest.mark.parametrize("seed", range(5))
def test_one_image_per_cluster_with_the_largest_cluster_first(seed):
    features, group = clusters([3, 9, 5, 7], seed=seed)
    rows = nearest_to_centers(features, 4, seed=seed)
    assert group[rows].tolist() == [1, 3, 2, 0]
    for row in rows:
        own = np.flatnonzero(group == group[row])
        center = features[own].mean(0)
        assert row == own[np.linalg.norm(features[own] - center, axis=1).argmin()]


def test_clusters_of_equal_size_are_ordered_by_row():
    features, _ = clusters([4, 4, 4])
    rows = nearest_to_centers(features, 3, seed=0).tolist()
    assert rows == sorted(rows)


def test_a_single_center_is_the_mean():
    features = np.random.default_rng(0).standard_normal((30, 4)) + 5
    nearest = np.linalg.norm(features - features.mean(0), axis=1).argmin()
    assert nearest_to_centers(features, 1, seed=3).tolist() == [nearest]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_identical_images_are_each_taken_once():
    rows = nearest_to_centers(np.ones((6, 2)), 4, seed=0)
    assert rows.tolist() == [0, 1, 2, 3]


def test_with_as_many_centers_as_images_all_are_taken():
    features = np.random.default_rng(0).standard_normal((7, 3))
    assert nearest_to_centers(features, 7, seed=1).tolist() == list(range(7))


def test_k_means_uses_one_thread_and_restores_the_number_of_threads(monkeypatch):
    seen = []

    class Spied(selection.KMeans):
        def fit(self, *args):
            seen.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit(*args)

    monkeypatch.setattr(selection, "KMeans", Spied)
    with threadpool_limits(3):
        before = threadpool_info()
        nearest_to_centers(clusters([3, 3])[0], 2, seed=0)
        assert threadpool_info() == before
    assert seen
    assert set(seen) == {1}


def test_k_means_uses_the_features_of_the_class(split, monkeypatch):
    seen = []

    def spy(features, count, *, seed):
        seen.append((features, seed))
        return np.arange(count)

    monkeypatch.setattr(selection, "nearest_to_centers", spy)
    monkeypatch.setattr(selection, "_BATCH", 5)
    chosen(split, reader(split), 2, "real_kmeans", seed=7)
    for label, (features, seed) in enumerate(seen):
        own = to_reference(split.images(split.rows_by_class(3)[label]))
        assert features.dtype == np.float64
        np.testing.assert_allclose(features, own.mean((2, 3)).numpy(), rtol=1e-4, atol=1e-6)
        assert seed == derived_seed(7, "k-means", label) % 2**32


def test_k_means_needs_a_linear_layer(split, teacher):
    bare = dataclasses.replace(teacher, model=nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(TeacherError, match="no linear layer"):
        chosen(split, bare, 2, "real_kmeans")


@pytest.mark.parametrize(("share", "ipc", "count"), [(0.5, 3, 6), (0.34, 2, 5), (0.1, 4, 4), (0.999, 2, 12)])
def test_random_images_of_the_easy_part_are_drawn_from_the_lowest_losses(split, teacher, share, ipc, count):
    settings = SynthesisRecipe(ipc=ipc, init="real_random", easiest=share)
    drawn = {seed: choose_rows(source_data(split), teacher, settings, seed=seed) for seed in range(80)}
    own = split.rows_by_class(3)[0]
    losses = [loss_of(teacher, split.images([row])[0], 0) for row in own.tolist()]
    easy = [int(row) for _, row in sorted(zip(losses, own.tolist(), strict=True))][:count]
    found = {int(row) for rows in drawn.values() for row in rows[:ipc]}
    assert found == set(easy), "every easy image is drawn by some seed, and no other"
    for seed, rows in drawn.items():
        assert split.labels[rows].tolist() == [label for label in range(3) for _ in range(ipc)]
        assert len(set(rows.tolist())) == 3 * ipc
        # The literal draw: easy rows in ascending order, permuted by a generator of this class.
        generator = torch.Generator().manual_seed(derived_seed(seed, "easy images", 0))
        order = torch.randperm(len(easy), generator=generator).tolist()
        assert rows[:ipc].tolist() == [sorted(easy)[i] for i in order][:ipc]


# -- mosaics ----------------------------------------------------------------------------------------------------------


def made(split, teacher, ipc, settings, *, seed=0):
    return mosaics(source_data(split), teacher, SynthesisRecipe(ipc=ipc, init="mosaic", mosaic=settings), seed=seed)


def literal_mosaics(split, teacher, ipc, settings, seed):
    """Build mosaics image by image and crop by crop, with PyTorch's own resize."""
    mean, std = reference_mean_std(split.channels)
    size, grid, result = split.size, settings.grid, []
    for label, rows in enumerate(split.rows_by_class(3)):
        generator = torch.Generator().manual_seed(derived_seed(seed, "mosaic", label))
        drawn = rows[sorted(torch.randperm(len(rows), generator=generator)[: settings.candidates].tolist())]
        boxes = draw_crop(len(drawn) * settings.crops, size, settings.crop_scale, generator)
        best = []
        for number, row in enumerate(drawn):
            image, tried = to_reference(split.images([row])), []
            for top, left, height, width in boxes[number * settings.crops : (number + 1) * settings.crops].tolist():
                crop = image[:, :, top : top + height, left : left + width]
                shown = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
                with torch.no_grad():
                    logits = teacher.logits(shown)[0].double()
                tried.append((float(logits.logsumexp(0) - logits[label]), crop))
            best.append(min(tried, key=lambda pair: pair[0]))
        best.sort(key=lambda pair: pair[0])
        if settings.easiest is not None:
            easy = best[: max(grid * grid * ipc, math.ceil(settings.easiest * len(best)))]
            best = [easy[i] for i in torch.randperm(len(easy), generator=generator)]
        cuts = [size * i // grid for i in range(grid + 1)]
        for slot in range(ipc):
            canvas = torch.zeros(split.channels, size, size)
            for place in range(grid * grid):
                y, x = divmod(place, grid)
                shape = (cuts[y + 1] - cuts[y], cuts[x + 1] - cuts[x])
                crop = best[slot * grid * grid + place][1]
                patch = F.interpolate(crop, shape, mode="bilinear", antialias=True)
                canvas[:, cuts[y] : cuts[y + 1], cuts[x] : cuts[x + 1]] = ((patch * std + mean) * 255)[0]
            result.append(canvas)
    return torch.stack(result)


@pytest.mark.parametrize(
    ("size", "channels", "ipc", "settings"),
    [
        (32, 3, 2, Mosaic(candidates=8, crops=3)),
        (33, 3, 1, Mosaic(candidates=300, crops=2, crop_scale=(0.3, 0.6))),
        (32, 1, 2, Mosaic(candidates=10, crops=4)),
        (32, 3, 1, Mosaic(crops=1, crop_scale=(1.0, 1.0), candidates=5)),
        (32, 3, 1, Mosaic(crops=1, crop_scale=(1.0, 1.0), easiest=0.7)),
        (32, 3, 1, Mosaic(candidates=8, crops=3, easiest=0.1)),
    ],
    ids=["plain", "odd side", "gray", "whole images", "whole images of the easy part", "an easy part that is too small"],
)
def test_mosaics_equal_the_literal_version(monkeypatch, size, channels, ipc, settings):
    split = make_split(size=size, channels=channels)
    teacher = make_teacher("test_resnet", size=size, channels=channels)
    monkeypatch.setattr(selection, "_BATCH", 7)
    found = made(split, teacher, ipc, settings, seed=3)
    assert found.dtype == torch.uint8
    assert found.shape == (3 * ipc, channels, size, size)
    expected = literal_mosaics(split, teacher, ipc, settings, 3)
    assert float((found.float() - expected).abs().max()) < 0.51, "rounded to nearest"


def test_three_by_three_patches_fill_the_image():
    split = make_split()
    teacher = make_teacher("test_resnet")
    settings = Mosaic(candidates=9, crops=2, grid=3)
    wide = make_split((9, 9, 9))
    assert (
        float((made(wide, teacher, 1, settings).float() - literal_mosaics(wide, teacher, 1, settings, 0)).abs().max())
        < 0.51
    )
    with pytest.raises(DataError, match="class 'cat' needs 9 candidates .* it has only 8 images; lower synthesis.ipc or"):
        made(split, teacher, 1, settings)


def test_the_error_for_too_few_candidates_says_what_to_change(split, teacher):
    with pytest.raises(DataError, match=r"needs 8 candidates .*mosaic.candidates is 5; raise it, or lower synthesis.ipc"):
        made(split, teacher, 2, Mosaic(candidates=5))


def test_candidates_are_checked_before_any_work(split):
    data = source_data(split)
    check_candidates(data, SynthesisRecipe(ipc=2, init="mosaic", mosaic=Mosaic()))
    check_candidates(data, SynthesisRecipe(ipc=100, init="real_random"))
    with pytest.raises(DataError, match="class 'bee' needs 12 candidates .* it has only 9 images"):
        check_candidates(data, SynthesisRecipe(ipc=3, init="mosaic", mosaic=Mosaic()))


def test_whole_images_with_the_lowest_loss_come_first(split):
    """Without crops and with a teacher that prefers a bright channel, the first patch is the brightest image."""
    judge = reader(split, torch.eye(3) * 5)
    found = made(split, judge, 1, Mosaic(candidates=300, crops=1, crop_scale=(1.0, 1.0)))
    for label, own in enumerate(split.rows_by_class(3)):
        means = to_reference(split.images(own)).mean((2, 3))
        order = (-(means * 5).log_softmax(1)[:, label]).argsort()[:4].tolist()
        for place, number in enumerate(order):
            y, x = divmod(place, 2)
            small = F.interpolate(split.images([own[number]]).float(), (16, 16), mode="bilinear", antialias=True)[0]
            shown = found[label][:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
            assert float((shown - small).abs().max()) < 0.51


def test_mosaics_depend_on_their_seed_and_settings(split, teacher):
    plain = Mosaic(candidates=8, crops=3)
    base = made(split, teacher, 2, plain)
    assert torch.equal(base, made(split, teacher, 2, plain))
    assert not torch.equal(base, made(split, teacher, 2, plain, seed=1))
    for change in ({"crops": 1}, {"crop_scale": (0.5, 1.0)}, {"candidates": 300}):
        assert not torch.equal(base, made(split, teacher, 2, dataclasses.replace(plain, **change)))


@pytest.mark.parametrize("init", ["real_median", "real_kmeans", "mosaic"])
def test_start_images_follow_the_recipe(tiny_recipe, split, teacher, init):
    changes = {"synthesis.init": init} | ({"synthesis.mosaic": {"crops": 2}} if init == "mosaic" else {})
    recipe = tiny_recipe(changes | {"seed": 4})
    images = choose_start_images(source_data(split), teacher, recipe.synthesis, seed=recipe.seed)
    if init == "mosaic":
        expected = made(split, teacher, 2, Mosaic(crops=2), seed=4)
    else:
        expected = split.images(chosen(split, teacher, 2, init, seed=4))
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected)
