"""Figures of the card: the image grid and the diversity plot, as PNG files with reproducible bytes."""

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import IdentityTransform
from PIL import Image
from torch import Tensor

from ..evaluation import Diversity
from ..runtime import visible, write_whole

MAX_CLASSES, MAX_SLOTS = 20, 10
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 120,
    "savefig.dpi": 120,
}
_THUMBNAIL, _PIXELS, _LINE = 64, 2**18, 16
"""Most pixels along a thumbnail, most pixels of all thumbnails together, and the height of a line of text in pixels."""


def grid(images_uint8: Tensor, ipc: int) -> Tensor:
    """Arrange class-major images (K * ipc, C, H, W) uint8 as one picture (C, H', W'): a row per class, 1 pixel apart."""
    rows = images_uint8.unflatten(0, (-1, ipc))[:MAX_CLASSES, :MAX_SLOTS]
    bordered = F.pad(rows, (0, 1, 0, 1), value=255)  # white to the right of each image, and below
    return bordered.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def draw_grid(path: Path, images_uint8: Tensor, class_names: Sequence[str], slots: int, *, ipc: int) -> None:
    """Draw thumbnails of the images (N, C, S, S) uint8, one row per class with its name, in a PNG of at most 300 kB.

    `images_uint8` has `slots` images of each class, at least of the first `MAX_CLASSES`; the whole set has `ipc`. If the
    picture shows a part of the classes or slots, it says so.
    """
    classes = min(len(class_names), MAX_CLASSES)
    rows = images_uint8.unflatten(0, (-1, slots))[:classes, :MAX_SLOTS].flatten(0, 1)
    small = _thumbnails(rows)
    names = [plain_name(name, f"class {k}", width=28, lines=5) for k, name in enumerate(class_names[:classes])]
    spare = max(0, 6 + _LINE * max(name.count("\n") + 1 for name in names) - small.shape[-2])
    picture = grid(F.pad(small, (0, 0, spare // 2, spare - spare // 2), value=255), min(slots, MAX_SLOTS))
    with matplotlib.rc_context(STYLE):
        image = _with_names(picture.expand(3, -1, -1), names, part_shown(len(class_names), ipc))
    # One byte per pixel, so that noise cannot make the file larger than its number of pixels.
    image = image.convert("L") if len(picture) == 1 else image.quantize(256)
    write_whole(path, lambda draft: image.save(draft, format="png", optimize=True))


def _thumbnails(images_uint8: Tensor) -> Tensor:
    """Return images (N, C, S, S) uint8, averaged down to fit the limits, or enlarged by a whole number."""
    size, side = images_uint8.shape[-1], min(_THUMBNAIL, math.isqrt(_PIXELS // len(images_uint8)))
    if size > side:
        return F.interpolate(images_uint8.float(), (side, side), mode="area").round().byte()
    return images_uint8.repeat_interleave(side // size, -1).repeat_interleave(side // size, -2)


def _with_names(picture: Tensor, names: Sequence[str], note: str) -> Image.Image:
    """Return a picture (3, H, W) uint8 of equally tall rows, with the name of each row to its left and a note below."""
    (high, wide), gap, below = picture.shape[-2:], 6, _LINE + 6 if note else 0
    left, tall = widest(names) + 2 * gap, (high + 1) // len(names)
    width = max(left + wide, widest([note]) + 2 * gap)
    figure = Figure()
    figure.set_size_inches(width / figure.dpi, (below + high) / figure.dpi)
    figure.figimage(picture.permute(1, 2, 0).numpy(), left, below)
    pixels = IdentityTransform()
    for row, name in enumerate(names):
        figure.text(left - gap, below + high - (row + 0.5) * tall, name, ha="right", va="center", transform=pixels)
    figure.text(gap, gap, note, va="bottom", transform=pixels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def widest(names: Sequence[str]) -> int:
    """Return the width in pixels of the widest of some texts, in the current style."""
    figure = Figure()
    return math.ceil(max(figure.text(0, 0, name).get_window_extent().width for name in names))


def part_shown(class_count: int, ipc: int) -> str:
    """Return which part of a set `draw_grid` shows, in words; empty if it shows all."""
    limits = ((MAX_CLASSES, class_count, "classes"), (MAX_SLOTS, ipc, "images per class"))
    return " and ".join(f"the first {most} of {count} {what}" for most, count, what in limits if count > most)


def draw_diversity(path: Path, sets: Mapping[str, Diversity], class_names: Sequence[str]) -> None:
    """Draw the intra-class similarity of each set: a dot per class and a line at the mean."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.55 * len(sets) + 0.9), layout="constrained")
        axes = figure.add_subplot()
        for height, diversity in enumerate(reversed(list(sets.values()))):
            values = [v for v in diversity.per_class if v is not None]
            axes.plot(values, np.full(len(values), height), "o", alpha=0.5, markersize=5, markeredgewidth=0)
            if diversity.mean is not None:
                axes.plot([diversity.mean] * 2, [height - 0.3, height + 0.3], "k-", linewidth=1.5)
                axes.annotate(f"{diversity.mean:.3f}", (diversity.mean, height + 0.32), ha="center", va="bottom")
            else:
                axes.annotate("one image per class: no pairs", (0.02, height), xycoords=("axes fraction", "data"))
        axes.set_yticks(range(len(sets)), [plain_name(name, "set") for name in reversed(list(sets))])
        axes.set_ylim(-0.6, len(sets) - 0.2)
        axes.set_xlabel(f"cosine similarity of features inside a class ({len(class_names)} classes; lower is more diverse)")
        save_figure(figure, path)


def plain_name(text: str, otherwise: str, *, width: int = 24, lines: int = 1) -> str:
    """Return a name that matplotlib can draw, in at most `lines` lines of at most `width` letters.

    Letters that its font lacks are left out, and `otherwise` says which name it is. A long name loses its middle, since
    names often differ only at their end.
    """
    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    name = " ".join(unicodedata.normalize("NFC", visible(text)).split())
    drawable = "".join(letter for letter in name if ord(letter) in glyphs).strip()
    if not name or drawable != name:
        name = f"{otherwise}: {drawable}" if any(map(str.isalnum, drawable)) else otherwise
    most, wrapped = width * lines, textwrap.wrap(name, width)
    while len(wrapped) > lines:
        wrapped = textwrap.wrap(f"{name[: most // 2].rstrip()}…{name[-((most - 1) // 2) :].lstrip()}", width)
        most -= 1
    # matplotlib reads $...$ as math, and class names are untrusted.
    return "\n".join(wrapped).replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without a time or program version, so that the same figure gives the same bytes."""
    write_whole(path, lambda draft: figure.savefig(draft, format="png", metadata={"Software": None}))
