"""Crop, resize, flip and roll a whole batch at once, with one linear map for each axis: `rows @ image @ columns^T`.

For one image, this equals `torch.nn.functional.interpolate(crop, mode="bilinear", antialias=True)` exactly.
Legend: B images, C channels, H W pixels of the source, S side of the result.
"""

import math

import torch
from torch import Tensor

from ..runtime import to_device


def axis_matrix(
    start: Tensor, length: Tensor, in_size: int, out_size: int, *, flip: Tensor | None = None, roll: int = 0
) -> Tensor:
    """Return the matrix that crops [start, start + length) of an axis and resizes it from `in_size` to `out_size` pixels.

    Start and length are (B,) int64. The result is (B, out_size, in_size) float32 on their device; rows sum to 1. The filter
    is a triangle, widened for shrinking (antialiasing) and renormalized at the borders, as in PyTorch's
    `interpolate(..., mode="bilinear", antialias=True)`. Then the axis is reversed where `flip`, (B,) bool, is true, and
    moved by `roll` pixels with wrap-around.
    """
    start, length = start.double().view(-1, 1, 1), length.double().view(-1, 1, 1)
    place = (torch.arange(out_size, device=start.device) - roll).remainder(out_size).view(1, -1, 1)
    if flip is not None:
        place = torch.where(flip.view(-1, 1, 1), out_size - 1 - place, place)
    scale = length / out_size
    center = start + (place.double() + 0.5) * scale
    # Only the few pixels near the center have a weight; a full table of distances would cost more than the resampling.
    reach = max(1, math.ceil(in_size / out_size))
    pixel = (center - 0.5).round() + torch.arange(-reach, reach + 1, device=start.device)
    weight = (1 - (pixel + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= start) & (pixel < start + length))
    weight = (weight / weight.sum(-1, keepdim=True)).float()
    matrix = weight.new_zeros(len(weight), out_size, in_size)
    return matrix.scatter_add_(2, pixel.clamp(0, in_size - 1).long(), weight)


def resample(
    images: Tensor, crop: Tensor, flip: Tensor, *, out_size: int | None = None, roll: tuple[int, int] = (0, 0)
) -> Tensor:
    """Crop, resize, flip and roll a batch of images, differentiably: (B, C, H, W) float -> (B, C, S, S).

    `crop` is (B, 4) int64 and `flip` is (B,) bool; a single row applies to the whole batch. S is `out_size`, by default W.
    `roll` is the number of pixels to move down and right, with wrap-around.
    """
    out_size = out_size or images.shape[-1]
    crop, flip = to_device(crop, images.device), to_device(flip, images.device)
    rows = axis_matrix(crop[:, 0], crop[:, 2], images.shape[-2], out_size, roll=roll[0])
    columns = axis_matrix(crop[:, 1], crop[:, 3], images.shape[-1], out_size, flip=flip, roll=roll[1])
    return rows.unsqueeze(1).to(images) @ images @ columns.mT.unsqueeze(1).to(images)
