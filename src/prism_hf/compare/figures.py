"""Figures of a comparison: accuracy, images, similarity and a feature map; the same facts give the same bytes."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from ..hub import MAX_CLASSES, MAX_SLOTS, STYLE, grid, plain_name, save_figure, widest

WIDTH = 10.0
"""Maximum figure width in inches (1200 pixels)."""
FEW_METHODS, FEW_CLASSES = 6, 10
"""With more methods than the first number, the grids show at most the second number of classes."""
SMALL_IMAGE, FEW_SLOTS = 40, 5
"""Images with longer sides than the first number are drawn about twice as large, at most the second number per class."""
LABEL_STYLE = {"soft": ("#0b6bb0", "o"), "image": ("#2e8b57", "D"), "hard": ("#d1590e", "s")}
"""Color and marker of each kind of label."""
_CONTROL_COLOR = "#555555"

Facts = Mapping[str, Any]
"""A comparison or a part of it, in the format of comparison.json."""


def draw_comparison(folder: Path, comparison: Facts, images: Mapping[str, Tensor]) -> dict[str, Path]:
    """Write the figures of a comparison as NAME.png; return their paths by name.

    `images` are the images of each method by its label, (K * ipc, C, H, W) uint8 sorted by class, all of the same size.
    """
    draw: dict[str, Callable[[Path, Facts], None]]
    draw = {"accuracy": draw_accuracy, "similarity": draw_similarity, "map": draw_map}
    draw["grids"] = partial(draw_grids, images=images)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in picture_names(comparison)}
    for name, path in paths.items():
        draw[name](path, comparison)
    return paths


def picture_names(comparison: Facts) -> list[str]:
    """Return the names of a comparison's figures; with one image per class in every set, there is no similarity figure."""
    if not comparison["methods"]:
        return []
    has_pairs = any(method["histogram"] for method in comparison["methods"])
    return ["accuracy", "grids", *(["similarity"] if has_pairs else []), "map"]


def in_order(comparison: Facts) -> list[Facts]:
    """Return the methods sorted by images per class, with the control first at each ipc."""
    return sorted(comparison["methods"], key=lambda method: (method["ipc"], not method["control"]))


@matplotlib.rc_context(STYLE)
def draw_accuracy(path: Path, comparison: Facts) -> None:
    """Draw the test top-1 of each method, one panel per student: seeds, mean and deviation, and all real data as a line."""
    scores, methods = comparison["scores"], in_order(comparison)
    students = list(dict.fromkeys(score["student"] for score in scores))
    kinds = [kind for kind in LABEL_STYLE if any(score["labels"] == kind for score in scores)]
    columns = min(2, len(students))
    rows = math.ceil(len(students) / columns)
    high = len(methods) * (0.2 + 0.17 * len(kinds)) + 0.75
    figure = Figure(figsize=(WIDTH, rows * high + 0.35), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, student in zip(panels, students, strict=False):
        _draw_student(axes, comparison, methods, student, kinds)
    for axes in panels[len(students) :]:
        axes.set_visible(False)
    panels[0].set_yticks(range(len(methods)), [_title(method, comparison, 30) for method in methods])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    handles = [_mark(f"{kind} labels", *LABEL_STYLE[kind]) for kind in kinds]
    if any(len(score["top1"]) > 1 for score in scores):
        handles.append(_mark("one seed", "#777777", size=2.6))
    if sum(method["control"] for method in methods) == 1:
        handles.append(_line("random real", "#777777", ":"))
    if comparison["full_data"]:
        handles.append(_line("all real data", "#333333", "--"))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    save_figure(figure, path)


def _draw_student(axes: Axes, comparison: Facts, methods: Sequence[Facts], student: str, kinds: Sequence[str]) -> None:
    by_key = {(s["method"], s["labels"]): s for s in comparison["scores"] if s["student"] == student}
    controls = [method for method in methods if method["control"]]
    for row, method in enumerate(methods):
        if method["control"]:
            axes.axhspan(row - 0.5, row + 0.5, color="#eeeeee", zorder=0)
        for index, kind in enumerate(kinds):
            if score := by_key.get((method["label"], kind)):
                _draw_score(axes, score, row + (index - (len(kinds) - 1) / 2) * 0.28, *LABEL_STYLE[kind])
    for kind in kinds if len(controls) == 1 else ():
        if score := by_key.get((controls[0]["label"], kind)):
            axes.axvline(100 * score["mean"], color=LABEL_STYLE[kind][0], linestyle=":", linewidth=1, zorder=1)
    for score in comparison["full_data"]:
        if score["student"] == student:
            axes.axvline(100 * score["mean"], color="#333333", linestyle="--", linewidth=1, zorder=1)
    axes.set_title(f"student {plain_name(student, 'student', width=40)}")
    axes.set_xlabel("test top-1 %")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)


def _draw_score(axes: Axes, score: Facts, height: float, color: str, marker: str) -> None:
    top1 = 100 * np.asarray(score["top1"], dtype=float)
    if len(top1) > 1:
        axes.plot(top1, np.full(len(top1), height + 0.1), "o", color=color, alpha=0.45, markersize=2.6, markeredgewidth=0)
    spread = None if score["std"] is None else 100 * score["std"]
    mean = 100 * score["mean"]
    axes.errorbar(mean, height, xerr=spread, fmt=marker, color=color, markersize=4.6, capsize=2.5, linewidth=1.2)


@matplotlib.rc_context(STYLE)
def draw_grids(path: Path, comparison: Facts, images: Mapping[str, Tensor]) -> None:
    """Draw the images of the methods side by side, with the same classes as rows and the same slots as columns."""
    methods, names = in_order(comparison), comparison["data"]["classes"]
    expected = {method["label"] for method in methods}
    if set(images) != expected:
        raise ValueError(f"expected images of {sorted(expected)}, got images of {sorted(images)}")
    height, width = next(iter(images.values())).shape[-2:]
    small, few = max(height, width) <= SMALL_IMAGE, len(methods) <= FEW_METHODS
    classes = min(len(names), MAX_CLASSES if small and few else FEW_CLASSES)
    most = MAX_SLOTS if small and few else FEW_SLOTS
    labels = [plain_name(name, f"class {k}", width=28, lines=2) for k, name in enumerate(names[:classes])]
    # All lengths are in inches: one image, the images of a method, and the distance from one method to the next.
    slots = min(most, max(method["ipc"] for method in methods))
    cell = min(0.5, max(0.28 if small else 0.54, 1.5 / slots))
    across, down = slots * cell, classes * cell * (height + 1) / (width + 1)
    step = max(1.7, across + 0.14)
    titles = [_grid_title(method, comparison, most, int((step - 0.1) / 0.056)) for method in methods]
    margin, above = 0.2 + widest(labels) / STYLE["figure.dpi"], 0.14 + 0.14 * max(title.count("\n") + 1 for title in titles)
    columns = max(1, min(len(methods), int((WIDTH - margin) // step)))
    rows = math.ceil(len(methods) / columns)
    columns = math.ceil(len(methods) / rows)
    wide, high = margin + columns * step, rows * (down + above) + 0.3
    figure = Figure(figsize=(wide, high))
    for index, (method, title) in enumerate(zip(methods, titles, strict=True)):
        x, y = margin + index % columns * step, high - (index // columns + 1) * (down + above)
        axes = figure.add_axes((x / wide, y / high, across / wide, down / high))
        picture = _picture(images[method["label"]], method, classes, most)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axes.set_xlim(-0.5, slots * (width + 1) - 1.5)  # the same scale for all panels
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title, loc="left", fontsize=8)
        if index % columns == 0:
            axes.set_yticks(np.arange(classes) * (height + 1) + height / 2, labels)
    if classes < len(names):
        figure.text(margin / wide, 0.1 / high, f"the first {classes} of {len(names)} classes")
    save_figure(figure, path)


def _picture(images_uint8: Tensor, method: Facts, classes: int, slots: int) -> NDArray[np.uint8]:
    """Arrange images (K * ipc, C, H, W) of the first classes and slots as one picture, (H', W') or (H', W', C)."""
    ipc = method["ipc"]
    if len(images_uint8) % ipc:
        raise ValueError(f"{method['label']!r} has {len(images_uint8)} images, which is not a multiple of its ipc {ipc}")
    cut = images_uint8.view(-1, ipc, *images_uint8.shape[1:])[:classes, :slots]
    picture = grid(cut.flatten(0, 1).cpu(), min(ipc, slots)).numpy()
    return picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)


def _grid_title(method: Facts, comparison: Facts, most: int, letters: int) -> str:
    """Return the title of a method, wrapped at `letters` characters, with a remark if not all slots are shown."""
    cut = f"\nfirst {most} of {method['ipc']} slots" if method["ipc"] > most else ""
    lines = _title(method, comparison, 30).split("\n")
    return "\n".join(textwrap.fill(line, letters) for line in lines) + cut


@matplotlib.rc_context(STYLE)
def draw_similarity(path: Path, comparison: Facts) -> None:
    """Draw histograms of the similarity of pairs within a class, one panel per method, each over that of real images."""
    methods = [method for method in in_order(comparison) if method["histogram"]]
    figure, panels = _small_multiples(methods, comparison, columns=3, high=1.65)
    real = comparison["real"]
    for axes, method in zip(panels, methods, strict=False):
        color = _CONTROL_COLOR if method["control"] else LABEL_STYLE["soft"][0]
        if real["histogram"]:
            axes.stairs(real["histogram"]["density"], real["histogram"]["edges"], fill=True, color="#cccccc")
        axes.stairs(method["histogram"]["density"], method["histogram"]["edges"], color=color, linewidth=1.4)
        for mean, line_color in ((real["similarity"]["mean"], "#999999"), (method["similarity"]["mean"], color)):
            if mean is not None:
                axes.axvline(mean, color=line_color, linestyle="--", linewidth=1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    histograms = [entry["histogram"] for entry in (real, *methods) if entry["histogram"]]
    bins = [bin_ for h in histograms for bin_ in zip(h["density"], h["edges"], h["edges"][1:], strict=False)]
    used = [edge for density, *edges in bins if density > 0 for edge in edges]
    low, high = min(used), max(used)
    panels[0].set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    handles = [_line("images of the method", LABEL_STYLE["soft"][0], width=1.4)]
    handles += [_line("random real (control)", _CONTROL_COLOR, width=1.4)]
    handles += [_line("real training images", "#cccccc", width=6), _line("mean", "#777777", "--")]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("cosine similarity of two images of the same class (vertical scale differs per panel)", fontsize=8)
    save_figure(figure, path)


@matplotlib.rc_context(STYLE)
def draw_map(path: Path, comparison: Facts) -> None:
    """Draw images of each method among real ones in the feature plane, one panel per method, colored by class."""
    methods, names = in_order(comparison), comparison["data"]["classes"]
    classes = min(len(names), MAX_CLASSES)
    palette = np.asarray(colormaps["tab10" if classes <= 10 else "tab20"].colors)[:classes]  # type: ignore[attr-defined]
    figure, panels = _small_multiples(methods, comparison, columns=4, high=None)
    for axes, method in zip(panels, methods, strict=False):
        xy, labels = _points(comparison["real"], classes)
        axes.scatter(*xy.T, c=0.62 + 0.38 * palette[labels], s=5, linewidths=0, zorder=1)
        xy, labels = _points(method, classes)
        size = float(np.clip(2400 / max(1, len(xy)), 7, 26))
        axes.scatter(*xy.T, c=palette[labels], s=size, linewidths=0.5, edgecolors="#222222", zorder=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#bbbbbb")
    named = [plain_name(name, f"class {k}", width=28, lines=2) for k, name in enumerate(names[:classes])]
    handles = [_mark(label, tuple(palette[k]), size=6) for k, label in enumerate(named)]
    columns = min(5, int(WIDTH / (widest(named) / STYLE["figure.dpi"] + 0.5)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    if classes < len(names):
        figure.suptitle(f"the first {classes} of {len(names)} classes", fontsize=8)
    save_figure(figure, path)


def _points(entry: Facts, classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the points (N, 2) of the first classes and their labels (N,)."""
    xy, labels = np.asarray(entry["points"]["xy"], dtype=float), np.asarray(entry["points"]["label"], dtype=np.int64)
    return xy[labels < classes], labels[labels < classes]


def _small_multiples(
    methods: Sequence[Facts], comparison: Facts, *, columns: int, high: float | None
) -> tuple[Figure, NDArray[Any]]:
    """Create a figure with a titled panel per method, all with the same axes, each `high` inches tall or else square."""
    rows = math.ceil(len(methods) / columns)
    columns = max(2, math.ceil(len(methods) / rows))
    tall = WIDTH / columns if high is None else high
    figure = Figure(figsize=(WIDTH, rows * tall + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=high is None).ravel()
    for axes, method in zip(panels, methods, strict=False):
        axes.set_title(_title(method, comparison, 36), loc="left", fontsize=8)
    for index, axes in enumerate(panels):
        axes.set_visible(index < len(methods))
        axes.tick_params(labelbottom=index + columns >= len(methods))
    return figure, panels


def _mark(label: str, color: Any, marker: str = "o", *, size: float = 5) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", markersize=size, label=label)


def _line(label: str, color: str, style: Any = "-", *, width: float = 1) -> Line2D:
    return Line2D([], [], color=color, linestyle=style, linewidth=width, label=label)


def _title(method: Facts, comparison: Facts, most: int) -> str:
    """Return the label and distinguishing remarks of a method, on two lines if one would exceed `most` characters."""
    name = plain_name(method["label"], f"method {comparison['methods'].index(method) + 1}", width=34)
    remarks = ["control"] if method["control"] else []
    if len({other["ipc"] for other in comparison["methods"]}) > 1 and f"ipc {method['ipc']}" not in method["label"]:
        remarks.append(f"ipc {method['ipc']}")
    if not remarks:
        return name
    remark = f"({', '.join(remarks)})"
    return name + ("\n" if len(name) + len(remark) >= most else " ") + remark
