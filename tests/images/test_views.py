import pytest
import torch
import torch.nn.functional as F

from prism_hf.images.resampling import axis_matrix, resample
from prism_hf.images.views import (
    ViewRows,
    apply_views,
    draw_crop,
    draw_views,
    from_columns,
    to_columns,
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=5, size=20, channels=3, seed=0):
    return torch.randn((count, channels, size, size), generator=seeded(seed))


def still(count):
    return torch.zeros(count, dtype=torch.bool)


BOXES = [
    (0, 0, 20, 20),
    (3, 2, 10, 7),
    (0, 13, 20, 7),
    (19, 19, 1, 1),
    (5, 5, 2, 15),
    (1, 0, 19, 20),
    (10, 4, 3, 3),
]


@pytest.mark.parametrize("out_size", [20, 9, 31])
def test_resample_equals_the_antialiased_interpolation_of_pytorch(out_size):
    boxes = torch.cat([torch.tensor(BOXES), draw_crop(40, 20, (0.05, 1.0), seeded())])
    x = images(len(boxes))
    ours = resample(x, boxes, still(len(boxes)), out_size=out_size)
    for image, (top, left, height, width), result in zip(x, boxes.tolist(), ours, strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(crop, (out_size, out_size), mode="bilinear", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_resample_works_on_oblong_images():
    x = torch.randn(1, 2, 12, 20)
    ours = resample(x, torch.tensor([[2, 5, 8, 14]]), still(1), out_size=10)
    expected = F.interpolate(x[:, :, 2:10, 5:19], (10, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_flip_is_applied_to_the_result():
    x, crop = images(), draw_crop(5, 20, (0.2, 1.0), seeded())
    flip = torch.tensor([True, False, True, True, False])
    plain, flipped = resample(x, crop, still(5)), resample(x, crop, flip)
    assert torch.equal(flipped[~flip], plain[~flip])
    torch.testing.assert_close(flipped[flip], plain[flip].flip(-1))


@pytest.mark.parametrize("roll", [(0, 0), (3, 0), (0, 4), (7, 11)])
def test_roll_wraps_around_after_the_flip(roll):
    x, crop, flip = images(), draw_crop(5, 20, (0.2, 1.0), seeded()), torch.ones(1, dtype=torch.bool)
    expected = torch.roll(resample(x, crop, flip), roll, dims=(2, 3))
    torch.testing.assert_close(resample(x, crop, flip, roll=roll), expected)


def test_one_row_applies_to_the_whole_batch():
    x, crop = images(), torch.tensor([[2, 3, 9, 12]])
    torch.testing.assert_close(resample(x, crop, still(1)), resample(x, crop.expand(5, 4), still(5)))


def test_full_crop_is_the_identity():
    x = images()
    crop = draw_crop(5, 20, (1.0, 1.0), seeded())
    assert crop.tolist() == [[0, 0, 20, 20]] * 5
    assert torch.equal(resample(x, crop, still(5)), x)


def test_constants_stay_constant():
    rows = axis_matrix(torch.tensor([0, 3, 19]), torch.tensor([20, 5, 1]), 20, 13)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 13))
    assert float(rows.min()) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resample_keeps_the_dtype(dtype):
    assert resample(images().to(dtype), torch.tensor([[0, 0, 9, 9]]), still(1)).dtype == dtype


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.001, 0.01), (0.9, 1.0), (1.0, 1.0), (0.3, 0.3)])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_boxes_are_inside_the_image_and_have_the_requested_area(scale, size):
    crop = draw_crop(500, size, scale, seeded())
    top, left, height, width = crop.unbind(1)
    assert int(crop.min()) >= 0
    assert int(torch.minimum(height, width).min()) >= 1
    assert int((top + height).max()) <= size
    assert int((left + width).max()) <= size
    area = (height * width).double() / size**2
    # Sides are rounded to whole pixels, so each may be off by half a pixel.
    slack = (height + width).double() / 2 / size**2 + 1 / size**2
    assert bool(((area >= scale[0] - slack) & (area <= scale[1] + slack)).all())


def test_boxes_reach_every_corner_and_both_extreme_aspect_ratios():
    top, left, height, width = draw_crop(2000, 16, (0.2, 0.6), seeded()).unbind(1)
    for start, length in ((top, height), (left, width)):
        assert int(start.min()) == 0
        assert bool((start + length == 16).any())
    assert bool((height > width).any())
    assert bool((height < width).any())
    ratio = width / height
    assert float(ratio.log().mean().abs()) < 0.03


@pytest.mark.parametrize(("cells", "size"), [(2, 20), (3, 27), (4, 64)])
def test_a_crop_stays_in_one_cell_and_every_cell_is_drawn(cells, size):
    side = size // cells
    crop = draw_views(4000, size, seeded(), crop_scale=(0.25, 1.0), flip=False, cells=cells).crop
    first, last = crop[:, :2] // side, (crop[:, :2] + crop[:, 2:] - 1) // side
    assert torch.equal(first, last)
    counts = torch.bincount(first[:, 0] * cells + first[:, 1], minlength=cells**2)
    assert len(counts) == cells**2
    assert int(counts.min()) > 0.7 * 4000 / cells**2
    area = (crop[:, 2] * crop[:, 3]).double() / side**2  # the fraction is that of the cell
    assert float(area.max()) <= 1
    assert float(area.mean()) == pytest.approx(0.625, abs=0.05)


def test_one_cell_is_the_whole_image():
    plain, one = (draw_views(50, 20, seeded(), crop_scale=(0.1, 1.0), flip=True, **more) for more in ({}, {"cells": 1}))
    assert torch.equal(plain.crop, one.crop)
    assert torch.equal(plain.flip, one.flip)


def test_flips_are_fair_coins_and_off_means_off():
    on = draw_views(2000, 8, seeded(), crop_scale=(0.5, 1), flip=True)
    off = draw_views(2000, 8, seeded(), crop_scale=(0.5, 1), flip=False)
    assert abs(float(on.flip.float().mean()) - 0.5) < 0.05
    assert not bool(off.flip.any())
    assert len(on.flip) == 2000


def test_equal_generators_give_equal_views():
    def draw(seed):
        return draw_views(6, 20, seeded(seed), crop_scale=(0.2, 1), flip=True, mix="cutmix")

    a, b, c = draw(0), draw(0), draw(1)
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in a.__dataclass_fields__)
    assert not torch.equal(a.crop, c.crop)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_cutmix_weight_is_the_area_outside_the_box(alpha):
    weights = []
    for seed in range(60):
        view = draw_views(4, 24, seeded(seed), crop_scale=(0.5, 1), flip=False, mix="cutmix", mix_alpha=alpha)
        top, left, height, width = view.mix_box[0].tolist()
        assert bool((view.mix_box == view.mix_box[0]).all())
        assert 0 <= top <= top + height <= 24
        assert 0 <= left <= left + width <= 24
        torch.testing.assert_close(view.mix_weight, torch.full((4,), 1 - height * width / 24**2))
        assert sorted(view.mix_with.tolist()) == [0, 1, 2, 3]
        weights.append(float(view.mix_weight[0]))
    assert len(set(weights)) > 20


def test_cutmix_shows_the_partner_in_the_box_and_nowhere_else():
    x = images(4)
    view = next(
        v
        for seed in range(50)
        if 0.2 < float((v := draw_views(4, 20, seeded(seed), crop_scale=(0.3, 1), flip=True, mix="cutmix")).mix_weight[0])
        and float(v.mix_weight[0]) < 0.8
    )
    top, left, height, width = view.mix_box[0].tolist()
    plain, mixed = resample(x, view.crop, view.flip), apply_views(x, view)
    expected = plain.clone()
    area = (..., slice(top, top + height), slice(left, left + width))
    expected[area] = plain[view.mix_with][area]
    assert torch.equal(mixed, expected)


def test_mixup_blends_with_one_weight():
    x = images(4)
    view = draw_views(4, 20, seeded(), crop_scale=(0.3, 1), flip=True, mix="mixup", mix_alpha=0.7)
    plain, weight = resample(x, view.crop, view.flip), float(view.mix_weight[0])
    assert 0 < weight < 1
    assert not bool(view.mix_box.any())
    torch.testing.assert_close(apply_views(x, view), weight * plain + (1 - weight) * plain[view.mix_with])


def test_no_mix_is_the_plain_view():
    x = images(4)
    view = draw_views(4, 20, seeded(), crop_scale=(0.3, 1), flip=True)
    assert torch.equal(apply_views(x, view), resample(x, view.crop, view.flip))
    assert view.mix_with.tolist() == [-1] * 4
    assert view.mix_weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_a_table_row_replays_its_view(mix):
    table = images(9, seed=3)
    for seed in range(5):
        rows = torch.randperm(9, generator=seeded(seed))[:5]
        view = draw_views(5, 20, seeded(seed), crop_scale=(0.2, 1), flip=True, mix=mix)
        columns = to_columns(view, rows)
        replayed = from_columns(columns)
        shown = apply_views(table[rows], view)
        torch.testing.assert_close(replayed.replay(table), shown, rtol=0, atol=1e-6)
        assert torch.equal(replayed.image_index, rows)
        # Any slice is enough on its own: no row needs the rest of its batch.
        torch.testing.assert_close(replayed[2:4].replay(table), shown[2:4], rtol=0, atol=1e-6)
        expected = rows[view.mix_with].tolist() if mix != "none" else [-1] * 5
        assert columns["mix_image_index"].tolist() == expected


def test_columns_are_small_integers():
    view = draw_views(5, 20, seeded(), crop_scale=(0.2, 1), flip=True, mix="cutmix")
    kinds = {key: column.dtype.name for key, column in to_columns(view, torch.arange(5)).items()}
    assert kinds == {
        "image_index": "int32",
        "crop": "int16",
        "flip": "bool",
        "mix_image_index": "int32",
        "mix_crop": "int16",
        "mix_flip": "bool",
        "mix_box": "int16",
        "mix_weight": "float32",
    }


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_gradient_flows_to_the_pixels(mix):
    x = images(3, size=8).double().requires_grad_()
    view = draw_views(3, 8, seeded(2), crop_scale=(0.5, 1), flip=True, mix=mix)
    assert torch.autograd.gradcheck(lambda t: apply_views(t, view), x, eps=1e-3, atol=1e-6)
    apply_views(x, view).sum().backward()
    assert bool((x.grad != 0).any())


def test_view_rows_are_sliceable_tables():
    view = draw_views(4, 20, seeded(), crop_scale=(0.2, 1), flip=True, mix="cutmix")
    rows = from_columns(to_columns(view, torch.arange(4)))
    assert isinstance(rows[1:3], ViewRows)
    assert len(rows[1:3].view.crop) == 2
