"""Crop, resize, flip and roll a whole batch at once, with one linear map for each axis: `rows @ image @ columns^T`.

For one image, this equals `torch.nn.functional.interpolate(crop, mode="bilinear", antialias=True)` exactly.
Legend: B images, C channels, H W pixels of the source, S side of the result.
"""

import torch
from torch import Tensor


def axis_matrix(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """Return the matrix that crops [start, start + length) of an axis and resizes it from `in_size` to `out_size` pixels.

    Start and length are (B,) int64. The result is (B, out_size, in_size) float32 on their device; rows sum to 1. The filter
    is a triangle, widened for shrinking (antialiasing) and renormalized at the borders, as in PyTorch's
    `interpolate(..., mode="bilinear", antialias=True)`.
    """
    start, length = start.double().view(-1, 1, 1), length.double().view(-1, 1, 1)
    scale = length / out_size
    support = scale.clamp(min=1)
    center = (torch.arange(out_size, device=start.device, dtype=torch.float64).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(in_size, device=start.device, dtype=torch.float64).view(1, 1, -1) - start
    weight = (1 - (pixel + 0.5 - center).abs() / support).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length))
    return (weight / weight.sum(-1, keepdim=True)).float()


def resample(
    images: Tensor, crop: Tensor, flip: Tensor, *, out_size: int | None = None, roll: tuple[int, int] = (0, 0)
) -> Tensor:
    """Crop, resize, flip and roll a batch of images, differentiably: (B, C, H, W) float -> (B, C, S, S).

    `crop` is (B, 4) int64 and `flip` is (B,) bool; a single row applies to the whole batch. S is `out_size`, by default W.
    `roll` is the number of pixels to move down and right, with wrap-around.
    """
    out_size = out_size or images.shape[-1]
    crop, flip = crop.to(images.device), flip.to(images.device)
    rows = axis_matrix(crop[:, 0], crop[:, 2], images.shape[-2], out_size)
    columns = axis_matrix(crop[:, 1], crop[:, 3], images.shape[-1], out_size)
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    rows, columns = rows.roll(roll[0], dims=1), columns.roll(roll[1], dims=1)
    return rows.unsqueeze(1).to(images) @ images @ columns.mT.unsqueeze(1).to(images)
