"""Random views: draw them, apply them to a whole batch at once, and convert them to and from table rows.

Legend: B images, C channels, H W pixels of the source, S side of the result.

A view is a crop box in integer source pixels, resized to S x S (bilinear with antialiasing), an optional flip, and an
optional partner image that is pasted as a box (CutMix) or blended (MixUp).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..runtime import to_device
from .resampling import resample

_ASPECT = (3 / 4, 4 / 3)
"""Range of the aspect ratio of a random resized crop: torchvision's default, as in all published code."""


@dataclass(frozen=True)
class View:
    """The views of a batch, one row per image. All tensors are on the CPU."""

    crop: Tensor  # top, left, height, width in source pixels, (B, 4) int64
    flip: Tensor  # horizontal flip after resizing, (B,) bool
    mix_with: Tensor  # position of the partner in the batch, or -1, (B,) int64
    mix_box: Tensor  # top, left, height, width in result pixels of the box that shows the partner; all zero for a blend
    mix_weight: Tensor  # weight of the image itself in the label and in a blend's pixels, (B,) float32; 1 without mix

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_crop(count: int, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw random resized crops of square images, (count, 4) int64: area fraction uniform in `scale`, aspect log-uniform.

    torchvision redraws a box that does not fit. Here, the aspect ratio is clamped to the range that fits, so that one draw
    always takes four random numbers.
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
    cells: int = 1,
) -> View:
    """Draw one view for each of `count` square images of a batch, whose side is `size` before and after.

    `crop_scale` is the smallest and largest fraction of the area. With `cells` above 1, the image is a grid with this many
    cells along each side, which divides `size`: each crop lies in a random cell, and the fraction is that of its area. A
    flip has probability 0.5. `mix` is `cutmix` (arXiv 1905.04899), `mixup` (arXiv 1710.09412) or `none`, with one weight
    (and box) per batch, from Beta(alpha, alpha).
    """
    side = size // cells
    crop = draw_crop(count, side, crop_scale, generator)
    if cells > 1:
        crop[:, :2] += side * torch.randint(cells, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    partner = torch.full((count,), -1, dtype=torch.int64)
    box = torch.zeros((count, 4), dtype=torch.int64)
    weight = torch.ones(count)
    if mix != "none":
        partner = torch.randperm(count, generator=generator)
        # numpy draws the Beta distribution. It is seeded from the generator, which thus determines all draws.
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
    """Apply views to a batch, (B, C, H, W) float -> (B, C, H, W), in any normalization (the map is linear, rows sum to 1).

    Mix partners are the images of the batch at `view.mix_with`, unless they are given with their own crops and flips.
    """
    cropped = resample(images, view.crop, view.flip)
    if not bool((view.mix_with >= 0).any()):
        return cropped
    if partners is None or partner_view is None:
        partner = cropped[to_device(view.mix_with.clamp(min=0), cropped.device)]
    else:
        partner = resample(partners, partner_view.crop, partner_view.flip)
    return torch.lerp(partner, cropped, _own_share(view, cropped.shape[-1], cropped.device).to(cropped))


def _own_share(view: View, size: int, device: torch.device) -> Tensor:
    """Return the weight of the image itself per pixel, (B, 1, S, S) float32: 0 in a CutMix box, constant for a blend."""
    box, weight = to_device(view.mix_box, device), to_device(view.mix_weight, device)
    top, left, height, width = box.view(-1, 4, 1, 1).unbind(1)
    pixels = torch.arange(size, device=device)
    y, x = pixels.view(1, -1, 1), pixels.view(1, 1, -1)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    is_box = (box[:, 2] * box[:, 3] > 0).view(-1, 1, 1)
    # An empty CutMix box has weight 1. A blend has an empty box and a weight below 1.
    share = torch.where(is_box, (~inside).float(), weight.view(-1, 1, 1))
    return share.unsqueeze(1)


def to_columns(view: View, image_index: Tensor) -> dict[str, np.ndarray]:
    """Convert one batch of views to table columns. Each row is enough to replay its view.

    `image_index`, (B,) int64, is each image's row in the image table. A `mix_image_index` of -1 means no partner.
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
    """Rows of the views table as tensors, for training students."""

    image_index: Tensor  # row of the image, (N,) int64
    view: View  # `mix_with` is the *image row* of the partner here, or -1
    partner: View  # the same view with the partner's crop and flip

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.image_index[rows], self.view[rows], self.partner[rows])

    def replay(self, images: Tensor, prepare: Callable[[Tensor], Tensor] = lambda picked: picked) -> Tensor:
        """Apply the recorded views to a table of images, (N_images, C, H, W). Only the images of these rows are read.

        `prepare` converts them to float on the device of the views. By default, the table already has that form.
        """
        rows = (self.image_index, self.view.mix_with.clamp(min=0))
        own, partners = (prepare(images[to_device(index, images.device)]) for index in rows)
        return apply_views(own, self.view, partners, self.partner)


def from_columns(columns: dict[str, np.ndarray]) -> ViewRows:
    """Convert table columns to `ViewRows`; the inverse of `to_columns`."""

    def tensor(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(columns[name], dtype=dtype)

    flip, weight = tensor("flip", torch.bool), tensor("mix_weight", torch.float32)
    view = View(tensor("crop"), flip, tensor("mix_image_index"), tensor("mix_box"), weight)
    # An unmixed row has an empty partner crop. Replay needs a valid one, which has no weight in the result.
    crop = torch.where((view.mix_with >= 0)[:, None], tensor("mix_crop"), view.crop)
    return ViewRows(tensor("image_index"), view, replace(view, crop=crop, flip=tensor("mix_flip", torch.bool)))
