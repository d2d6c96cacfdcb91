"""What the image processor of a transformers model does to the pixels, found out by showing it a picture."""

import copy
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import TeacherError

_OF_PIXELS = ("do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb", "do_grayscale", "do_color_quantize")
"""Switches of a processor that change pixel values. The others change size and position: resizing, crops, padding."""
_TOLERANCE = 1e-4
"""Largest difference from the processor's own output, relative to its range."""


class PixelMap(NamedTuple):
    """Output channel c is (p - mean[c]) / std[c], where p is channel order[c] of the picture, in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]


def pixel_map(processor: Any, channels: int, side: int, name: str) -> PixelMap:
    """Return what a processor does to the pixels of a square picture, apart from resizing, cropping and padding it.

    Configs state the same map in many ways (`do_rescale`, offsets, mean in 0..255, BGR, a second division by std), so the
    processor is asked instead. If the map is the one of its `image_mean` and `image_std`, exactly these are returned.

    Raises:
        TeacherError: The processor fails, or does anything but scale, shift and reorder the channels.
    """
    shown = copy.deepcopy(processor)
    for switch in [key for key in vars(shown) if key.startswith("do_") and key not in _OF_PIXELS]:
        setattr(shown, switch, False)
    shape = (side, side, 3) if channels == 3 else (side, side)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    try:
        values = np.asarray(shown(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0], dtype=np.float64)
    except Exception as error:  # an untrusted preprocessor_config.json sets the steps, so any error can occur
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(f"teacher {name!r}: its image processor fails ({type(error).__name__}: {reason})") from error
    picture = pixels.reshape(side, side, -1).transpose(2, 0, 1) / 255
    stated = _stated(shown, channels)
    if stated is not None and _agrees(values, picture, stated):
        return stated
    fitted = _fitted(values, picture)
    if fitted is None or not _agrees(values, picture, fitted):
        raise TeacherError(
            f"teacher {name!r}: its image processor {type(processor).__name__} does more to the pixels than scale, shift "
            "and reorder their channels; load the model through timm, or use another teacher"
        )
    return fitted


def _stated(processor: Any, channels: int) -> PixelMap | None:
    mean, std = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    if mean is None or std is None or not len(mean) == len(std) == channels or 0 in std:
        return None
    return PixelMap(tuple(mean), tuple(std), tuple(range(channels)))


def _fitted(values: np.ndarray, picture: np.ndarray) -> PixelMap | None:
    """Return the straight line from an input channel to each output channel, for the input channel that fits best."""
    if values.ndim != 3 or values.shape[1:] != picture.shape[1:] or not np.isfinite(values).all():
        return None
    lines = []
    for output in values:
        fits = []
        for channel, given in enumerate(picture):
            slope, shift = np.polyfit(given.ravel(), output.ravel(), 1)
            fits.append((np.abs(slope * given + shift - output).max(), channel, slope, shift))
        _, channel, slope, shift = min(fits)
        if slope == 0:
            return None
        lines.append((-shift / slope, 1 / slope, channel))
    mean, std, order = zip(*lines, strict=True)
    return PixelMap(tuple(map(float, mean)), tuple(map(float, std)), order)


def _agrees(values: np.ndarray, picture: np.ndarray, found: PixelMap) -> bool:
    mean, std = (np.array(part).reshape(-1, 1, 1) for part in (found.mean, found.std))
    expected = (picture[list(found.order)] - mean) / std
    if values.shape != expected.shape:
        return False
    return bool(np.abs(values - expected).max() <= _TOLERANCE * max(1.0, np.abs(values).max()))
