"""Pixels: the reference normalization, its valid range, and their way to uint8 and to bytes.

Legend: B images, C channels (1 or 3), H W pixels.

Pixels are optimized in one *reference normalization* (that of the ImageNet models for RGB, its gray mean for one
channel), so that published learning rates keep their meaning whatever the teachers' own normalization is.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError

REFERENCE = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are not a sane picture."""
ImageFormat = Literal["png", "webp", "jpeg"]


def reference_mean_std(channels: int, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the reference normalization, each (1, C, 1, 1), in [0, 1] pixel units."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in REFERENCE[channels])
    return (mean, std) if like is None else (mean.to(like), std.to(like))


def to_reference(images_uint8: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> float32 in the reference normalization."""
    images = images_uint8.float()
    mean, std = reference_mean_std(images.shape[1], like=images)
    return (images / 255 - mean) / std


def to_uint8(images: Tensor) -> Tensor:
    """Reference normalization -> (B, C, H, W) uint8, rounded to nearest (the published code truncates), clamped."""
    mean, std = reference_mean_std(images.shape[1], like=images)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def clamp_(images: Tensor) -> Tensor:
    """Clamp in place to the values that a picture can hold, channel by channel."""
    mean, std = reference_mean_std(images.shape[1], like=images)
    return images.clamp_(min=-mean / std, max=(1 - mean) / std)


def noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """N(0, 1) in the reference normalization: the init of SRe2L and G-VBSM. Drawn on the CPU: the same on any device."""
    return torch.randn(tuple(shape), generator=generator)


def encode(image_uint8: Tensor, image_format: ImageFormat, *, jpeg_quality: int = 95) -> bytes:
    """One (C, H, W) uint8 image as file bytes; `png` and `webp` are lossless.

    A recipe refuses `webp` for one channel: the format has no gray mode, and would come back as RGB.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {},
        "webp": {"lossless": True},
        # 4:4:4: chroma subsampling would blur colors that were optimized pixel by pixel.
        "jpeg": {"quality": jpeg_quality, "subsampling": 0},
    }
    picture = Image.fromarray(image_uint8.cpu().permute(1, 2, 0).squeeze(2).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options[image_format])
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> Tensor:
    """File bytes -> (C, H, W) uint8, converted to gray or RGB.

    Raises:
        DataError: The bytes are not a picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return from_pil(picture, channels)
    except UNREADABLE as error:
        raise DataError(f"an image cannot be decoded ({error}); remove or replace it in the source") from error


def from_pil(picture: Image.Image, channels: int, *, size: int | None = None) -> Tensor:
    """PIL -> (C, H, W) uint8, upright as EXIF says.

    With `size`: the shorter side is resized to it (bilinear, antialiased), then the center square is cut out.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # Pillow saturates 16-bit gray when it converts; scale it instead.
        picture = Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        width, height = picture.size
        scale = size / min(width, height)
        new = (max(size, round(width * scale)), max(size, round(height * scale)))
        picture = picture.resize(new, Image.Resampling.BILINEAR)
        left, top = (new[0] - size) // 2, (new[1] - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    array = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())
