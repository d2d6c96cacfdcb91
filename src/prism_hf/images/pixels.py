"""Pixels: the reference normalization, its valid range, and conversion to uint8 and to encoded bytes.

Legend: B images, C channels (1 or 3), H W pixels.

Pixels are optimized in one *reference normalization* (that of the ImageNet models for RGB, its gray mean for one
channel), so that published learning rates keep their meaning whatever normalization the teachers use.
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
"""Errors that Pillow raises for bytes that are not a valid image."""
ImageFormat = Literal["png", "webp", "jpeg"]


def reference_mean_std(channels: int, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the reference normalization, each (1, C, 1, 1), in [0, 1] pixel units."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in REFERENCE[channels])
    return (mean, std) if like is None else (mean.to(like), std.to(like))


def to_reference(images_uint8: Tensor) -> Tensor:
    """Convert (B, C, H, W) uint8 to float32 in the reference normalization."""
    images = images_uint8.float()
    mean, std = reference_mean_std(images.shape[1], like=images)
    return (images / 255 - mean) / std


def to_uint8(images: Tensor) -> Tensor:
    """Convert the reference normalization to (B, C, H, W) uint8, rounded (the published code truncates) and clamped."""
    mean, std = reference_mean_std(images.shape[1], like=images)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def clamp_(images: Tensor) -> Tensor:
    """Clamp in place to the valid pixel range of each channel."""
    mean, std = reference_mean_std(images.shape[1], like=images)
    return images.clamp_(min=-mean / std, max=(1 - mean) / std)


def noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) in the reference normalization (init of SRe2L and G-VBSM), on the CPU: the same for any device."""
    return torch.randn(tuple(shape), generator=generator)


def encode(image_uint8: Tensor, image_format: ImageFormat, *, jpeg_quality: int = 95) -> bytes:
    """Encode one (C, H, W) uint8 image as file bytes. `png` and `webp` are lossless.

    Recipes refuse `webp` for one channel: the format has no gray mode, so the image would be decoded as RGB.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {},
        "webp": {"lossless": True},
        # 4:4:4, since chroma subsampling would blur colors that were optimized for each pixel.
        "jpeg": {"quality": jpeg_quality, "subsampling": 0},
    }
    picture = Image.fromarray(image_uint8.cpu().permute(1, 2, 0).squeeze(2).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options[image_format])
    return buffer.getvalue()


def decode(data: bytes, channels: int) -> Tensor:
    """Decode file bytes to (C, H, W) uint8, converted to gray or RGB.

    Raises:
        DataError: The bytes are not a valid image.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return from_pil(picture, channels)
    except UNREADABLE as error:
        raise DataError(f"an image cannot be decoded ({error}); remove or replace it in the source") from error


def from_pil(picture: Image.Image, channels: int, *, size: int | None = None) -> Tensor:
    """Convert a PIL image to (C, H, W) uint8, rotated as its EXIF data says.

    With `size`, the shorter side is resized to it (bilinear, antialiased), and the center square is cropped.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # Pillow's conversion saturates 16-bit gray, so scale it here.
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
