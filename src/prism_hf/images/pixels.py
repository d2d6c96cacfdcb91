"""Pixels: the reference normalization, its valid range, and conversion to uint8 and to encoded bytes.

Legend: B images, C channels (1 or 3), H W pixels.

Pixels are optimized in one *reference normalization* (that of the ImageNet models for RGB, its gray mean for one
channel), so that published learning rates keep their meaning whatever normalization the teachers use.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
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


@lru_cache(maxsize=64)
def _constants(channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the numbers of `reference_mean_std` on a device, made once: a copy at every step would keep it waiting."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(device, dtype) for v in REFERENCE[channels])
    return mean, std


def reference_mean_std(channels: int, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the reference normalization, each (1, C, 1, 1), in [0, 1] pixel units."""
    if like is None:
        return _constants(channels, torch.device("cpu"), torch.float32)
    return _constants(channels, like.device, like.dtype)


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
    except DataError as error:
        raise DataError(f"an image {error}") from error
    except UNREADABLE as error:
        raise DataError(f"an image cannot be decoded ({error}); remove or replace it in the source") from error


def from_pil(
    picture: Image.Image,
    channels: int,
    *,
    size: int | None = None,
    background: str = "white",
    white_level: float | None = None,
) -> Tensor:
    """Convert a PIL image to (C, H, W) uint8, rotated as its EXIF data says.

    With `size`, the shorter side is resized to it (bilinear, antialiased), and the center square is cropped. Transparent
    pixels show the background, a color of Pillow. `white_level` is explained in `DataRecipe`.

    Raises:
        DataError: The values of an image with more than 8 bits do not match the white level.
    """
    deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", []))  # cleared when the pixels are read
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _scaled(picture, white_level)
    elif deep:
        _check_deep_color(picture, white_level)
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))
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


def _scaled(picture: Image.Image, white_level: float | None) -> Image.Image:
    """Scale an image of 16-bit or 32-bit integers or floats to 8 bits. Pillow's conversion saturates instead."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    white = white_level or {"I": None, "F": 1.0}.get(picture.mode, 65535.0)
    kind = {"I": "32-bit integers", "F": "floats"}.get(picture.mode, "16-bit integers")
    fix = "set data.white_level to the value that means white, or save the images with 8 bits"
    if white is None or not 0 <= low <= high <= white:
        expected = "a data.white_level" if white is None else f"0 to {white:g}"
        raise DataError(f"has {kind} from {low:g} to {high:g}, expected {expected}; {fix}")
    if white_level is None and picture.mode != "F":
        _check_bits(high / 65535, fix)
    scaled = Image.fromarray((values * 255 / white).round().astype(np.uint8))
    if "transparency" in picture.info:  # the gray value that is transparent
        scaled.putalpha(Image.fromarray(((values != picture.info["transparency"]) * 255).astype(np.uint8)))
    return scaled


def _check_deep_color(picture: Image.Image, white_level: float | None) -> None:
    """Check a color image with 16 bits per channel, of which Pillow keeps the upper 8."""
    fix = "save the images with 8 bits (Pillow reads only the upper 8 of 16 bits of a color image)"
    if white_level not in (None, 65535):
        raise DataError(f"has 16 bits per color, and data.white_level is {white_level:g}, which needs all of them; {fix}")
    if white_level is None:
        _check_bits(int(np.asarray(picture.convert("RGB")).max()) / 255, fix)


def _check_bits(share: float, fix: str) -> None:
    """Refuse a 16-bit image, neither black nor brighter than a quarter of white: probably it has fewer bits."""
    if 0 < share <= 0.25:
        bits = next(bits for bits in (8, 10, 12, 14) if share <= 2**bits / 2**16)
        raise DataError(
            f"is a 16-bit image whose largest value fits into {bits} bits, so it would be almost black; {fix} "
            "(data.white_level=65535 if it really is that dark)"
        )
