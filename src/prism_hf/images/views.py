"""Random views: drawn, applied to a whole batch at once, and written to or read from the rows of a table.

Legend: B images, C channels, H W pixels of the source, S side of the result.

A view is a crop box in whole source pixels, resized to S x S (bilinear with antialiasing), an optional flip, and an
optional partner: pasted as a box (CutMix) or blended (MixUp).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .resampling import resample

_ASPECT = (3 / 4, 4 / 3)
"""Range of the aspect ratio of a random resized crop: torchvision's default, as in all published codes."""


@dataclass(frozen=True)
class View:
    """The views of a batch, one row per image; all tensors on the CPU."""

    crop: Tensor  # top, left, height, width in source pixels, (B, 4) int64
    flip: Tensor  # horizontal flip after resizing, (B,) bool
    mix_with: Tensor  # position in the batch of the partner, or -1, (B,) int64
    mix_box: Tensor  # top, left, height, width in result pixels of the box that shows the partner; all zero for a blend
    mix_weight: Tensor  # share of the image itself in the label and in a blend's pixels, (B,) float32; 1 without mix

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_crop(count: int, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Random resized crops of square images, (count, 4) int64: area share uniform in `scale`, aspect log-uniform.

    torchvision draws again when a box does not fit; here the range of aspects narrows with the room that is left, so
    that one draw is always four numbers.
    """
    uniform = torch.rand((4, count), generator=generator, dtype=torch.float64)
    area = (scale[0] + (scale[1] - scale[0]) * uniform[0]) * size * size
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    room = torch.log(size * size / area)
    aspect = torch.exp((low + (high - low) * uniform[1]).clamp(min=-room, max=room))
    width = torch.sqrt(area * aspect).round().clamp(1, size).long()
    height = torch.sqrt(area / aspect).round().clamp(1, size).long()
    top = ((size - height + 1) * uniform[2]).long().clamp(max=size - height)
    left = ((size - width + 1) * uniform[3]).long().clamp(max=size - width)
    return torch.stack([top, left, height, width], dim=1)


def draw_views(
    count: int,
    size: int,
    generator: torch.Generator,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
    mix: str = "none",
    mix_alpha: float = 1.0,
) -> View:
    """Draw one view for each of `count` square images of a batch, whose side is `size` before and after.

    `crop_scale` is the smallest and largest share of the area; a flip has probability 0.5. `mix` is `cutmix` (arXiv
    1905.04899), `mixup` (arXiv 1710.09412) or `none`: one weight (and box) for the whole batch, from Beta(alpha, alpha).
    """
    crop = draw_crop(count, size, crop_scale, generator)
    flips = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    partner = torch.full((count,), -1, dtype=torch.int64)
    box = torch.zeros((count, 4), dtype=torch.int64)
    weight = torch.ones(count)
    if mix != "none":
        partner = torch.randperm(count, generator=generator)
        # numpy has the Beta distribution; seeded from our generator, so that one generator rules all draws.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        share = np.random.Generator(np.random.PCG64(seed)).beta(mix_alpha, mix_alpha)
        if mix == "cutmix":
            box[:] = _cutmix_box(size, share, generator)
            share = 1 - int(box[0, 2] * box[0, 3]) / size**2
        weight[:] = share
    return View(crop, flips, partner, box, weight)


def _cutmix_box(size: int, share: float, generator: torch.Generator) -> Tensor:
    side = int(size * math.sqrt(1 - share))
    center = torch.randint(size, (2,), generator=generator)
    low = (center - side // 2).clamp(0, size)
    high = (center - side // 2 + side).clamp(0, size)
    return torch.cat([low, high - low])


def apply_views(images: Tensor, view: View, partners: Tensor | None = None, partner_view: View | None = None) -> Tensor:
    """The views of a batch: (B, C, H, W) float -> (B, C, H, W), in any normalization (the map is linear, rows sum to 1).

    Mix partners are found in the batch itself, at `view.mix_with`, unless they are given with their own crops and flips.
    """
    shown = resample(images, view.crop, view.flip)
    mixed = view.mix_with >= 0
    if not bool(mixed.any()):
        return shown
    if partners is None or partner_view is None:
        other = shown[view.mix_with.clamp(min=0).to(shown.device)]
    else:
        other = resample(partners, partner_view.crop, partner_view.flip)
    return torch.lerp(other, shown, _own_share(view, shown.shape[-1]).to(shown))


def _own_share(view: View, size: int) -> Tensor:
    """Share of the image itself at each pixel, (B, 1, S, S) float32: 0 inside a CutMix box, a constant for a blend."""
    top, left, height, width = view.mix_box.view(-1, 4, 1, 1).unbind(1)
    y, x = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    is_box = (view.mix_box[:, 2] * view.mix_box[:, 3] > 0).view(-1, 1, 1)
    # A CutMix box may be empty (weight 1); a blend has an empty box and a weight below 1.
    share = torch.where(is_box, (~inside).float(), view.mix_weight.view(-1, 1, 1))
    return share.unsqueeze(1)


def to_columns(view: View, image_index: Tensor) -> dict[str, np.ndarray]:
    """One batch of views as table columns; a row alone is enough to replay its view.

    `image_index`, (B,) int64, is the row in the image table of each image; a `mix_image_index` of -1 means no partner.
    """
    partner = view.mix_with.clamp(min=0)
    mixed = view.mix_with >= 0
    return {
        "image_index": image_index.numpy().astype(np.int32),
        "crop": view.crop.numpy().astype(np.int16),
        "flip": view.flip.numpy(),
        "mix_image_index": torch.where(mixed, image_index[partner], -1).numpy().astype(np.int32),
        "mix_crop": torch.where(mixed[:, None], view.crop[partner], 0).numpy().astype(np.int16),
        "mix_flip": (mixed & view.flip[partner]).numpy(),
        "mix_box": view.mix_box.numpy().astype(np.int16),
        "mix_weight": view.mix_weight.numpy().astype(np.float32),
    }


@dataclass(frozen=True)
class ViewRows:
    """Rows of the views table, as tensors: what a student trains on."""

    image_index: Tensor  # row of the image, (N,) int64
    view: View  # `mix_with` is the *image row* of the partner here, or -1
    partner: View  # the same with crop and flip of the partner

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.image_index[rows], self.view[rows], self.partner[rows])

    def replay(self, images: Tensor, prepare: Callable[[Tensor], Tensor] = lambda picked: picked) -> Tensor:
        """The recorded views of a table of images, (N_images, C, H, W); only the images of these rows are read.

        `prepare` makes them float, where the views are to be; by default the table is so already.
        """
        rows = (self.image_index, self.view.mix_with.clamp(min=0))
        own, partners = (prepare(images[index.to(images.device)]) for index in rows)
        return apply_views(own, self.view, partners, self.partner)


def from_columns(columns: dict[str, np.ndarray]) -> ViewRows:
    """Table columns -> `ViewRows`; the inverse of `to_columns`."""

    def tensor(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(columns[name], dtype=dtype)

    flip, weight = tensor("flip", torch.bool), tensor("mix_weight", torch.float32)
    view = View(tensor("crop"), flip, tensor("mix_image_index"), tensor("mix_box"), weight)
    # An unmixed row has an empty partner crop; give the replay a valid one, it has no weight in the result.
    crop = torch.where((view.mix_with >= 0)[:, None], tensor("mix_crop"), view.crop)
    return ViewRows(tensor("image_index"), view, replace(view, crop=crop, flip=tensor("mix_flip", torch.bool)))
