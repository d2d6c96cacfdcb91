"""Figures of the card: the image grid and the diversity plot, as PNG files with reproducible bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from torch import Tensor

from ..evaluation import Diversity
from ..runtime import write_whole

MAX_CLASSES, MAX_SLOTS = 20, 10
STYLE: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120}


def grid(images_uint8: Tensor, ipc: int) -> Tensor:
    """Arrange class-major images (K * ipc, C, H, W) uint8 as one picture (C, H', W'): a row per class, 1 pixel apart."""
    rows = images_uint8.unflatten(0, (-1, ipc))[:MAX_CLASSES, :MAX_SLOTS]
    bordered = F.pad(rows, (0, 1, 0, 1), value=255)  # white to the right of each image, and below
    return bordered.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def draw_grid(path: Path, images_uint8: Tensor, class_names: Sequence[str], ipc: int) -> None:
    """Draw the images, one row per class with its name; at most `MAX_CLASSES` classes and `MAX_SLOTS` slots."""
    picture = grid(images_uint8, ipc).numpy()
    side = images_uint8.shape[-2] + 1
    classes = min(len(class_names), MAX_CLASSES)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 * min(ipc, MAX_SLOTS) + 1.4, 0.8 * classes + 0.2), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(picture.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        names = [plain_name(name, f"class {k}") for k, name in enumerate(class_names[:classes])]
        axes.set_yticks(np.arange(classes) * side + side / 2, names)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        save_figure(figure, path)


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


def plain_name(text: str, otherwise: str, *, most: int = 24) -> str:
    """Return a name that matplotlib can draw, of at most `most` letters; `otherwise` if its font lacks a letter."""
    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    if not all(ord(letter) in glyphs for letter in text):
        return otherwise
    short = text if len(text) <= most else text[: most - 1] + "…"
    # matplotlib reads $...$ as math, and class names are untrusted.
    return short.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without a time or program version, so that the same figure gives the same bytes."""
    write_whole(path, lambda draft: figure.savefig(draft, format="png", metadata={"Software": None}))
