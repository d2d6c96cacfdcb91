"""What a comparison of methods looks like: accuracy, images, similarity and a feature map, the same bytes each time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
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

from ..hub.figures import MAX_CLASSES, MAX_SLOTS, STYLE, grid, plain_name, save_figure
from ..runtime.untrusted import visible

WIDTH = 10.0
"""Inches of every picture; 1200 pixels."""
FEW_METHODS, FEW_CLASSES = 6, 10
"""Above so many methods the grids show so many classes."""
SMALL_IMAGE, FEW_SLOTS = 40, 5
"""Images with longer sides are shown twice as large, and so many of a class."""
LABEL_STYLE = {"soft": ("#0b6bb0", "o"), "image": ("#2e8b57", "D"), "hard": ("#d1590e", "s")}
"""Colour and marker by kind of label."""


def draw_comparison(folder: Path, comparison: Mapping[str, Any], grids: Mapping[str, Tensor]) -> dict[str, Path]:
    """Write the pictures of a comparison; one without data is not written.

    Args:
        folder: Where `grids.png`, `accuracy.png`, `similarity.png` and `map.png` go.
        comparison: What was found, plain JSON.
        grids: By label of the method its images, class-major (K * ipc, C, H, W) uint8, all of one size; the random-real
            controls must be among them.

    Returns:
        Path by name: `accuracy`, `grids`, `similarity`, `map`.

    Raises:
        ValueError: There are images of an unknown method, a control's are missing, or their number does not fit the ipc.
    """
    draw: dict[str, Callable[[Path], None]] = {
        "accuracy": lambda path: draw_accuracy(path, comparison),
        "grids": lambda path: draw_grids(path, comparison, grids),
        "similarity": lambda path: draw_similarity(path, comparison),
        "map": lambda path: draw_map(path, comparison),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f"{name}.png" for name in drawn(comparison) if name != "grids" or grids}
    for name, path in written.items():
        draw[name](path)
    return written


def drawn(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """The pictures that `draw_comparison` makes of a comparison whose methods come with their images."""
    methods = comparison["methods"]
    there = {
        "accuracy": any(method["label"] in _scored(comparison) for method in methods),
        "grids": any(method["grid"] for method in methods),
        "similarity": any(method["histogram"] for method in methods),
        "map": any(_points(method) is not None for method in methods),
    }
    return tuple(name for name, known in there.items() if known)


def in_order(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods by images per class, the control first among those of one number."""
    return sorted(comparison["methods"], key=lambda method: (method["ipc"], not method["control"]))


# -- accuracy ---------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_accuracy(path: Path, comparison: Mapping[str, Any]) -> None:
    """Top-1 of each method, a panel per student: mean and standard deviation, single seeds, all real data as a line."""
    scores = comparison["scores"]
    methods = [method for method in in_order(comparison) if method["label"] in _scored(comparison)]
    students = _unique(score["student"] for score in scores)
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
    figure.legend(handles=_accuracy_legend(comparison, kinds), loc="outside upper center", ncols=5, frameon=False)
    save_figure(figure, path)


def _draw_student(
    axes: Axes, comparison: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], student: str, kinds: Sequence[str]
) -> None:
    by_key = {(s["method"], s["labels"]): s for s in comparison["scores"] if s["student"] == student}
    controls = [method for method in methods if method["control"]]
    for row, method in enumerate(methods):
        if method["control"]:
            axes.axhspan(row - 0.5, row + 0.5, color="#eeeeee", zorder=0)
        for place, kind in enumerate(kinds):
            score = by_key.get((method["label"], kind))
            if score is not None:
                _draw_score(axes, score, row + (place - (len(kinds) - 1) / 2) * 0.28, *LABEL_STYLE[kind])
    for kind in kinds if len(controls) == 1 else ():
        score = by_key.get((controls[0]["label"], kind))
        if score is not None:
            axes.axvline(100 * score["mean"], color=LABEL_STYLE[kind][0], linestyle=":", linewidth=1, zorder=1)
    for score in comparison["full_data"]:
        if score["student"] == student:
            axes.axvline(100 * score["mean"], color="#333333", linestyle="--", linewidth=1, zorder=1)
    axes.set_title(f"student {_name(student, 'student')}")
    axes.set_xlabel("test top-1 %")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)


def _draw_score(axes: Axes, score: Mapping[str, Any], height: float, colour: str, marker: str) -> None:
    top1 = 100 * np.asarray(score["top1"], dtype=float)
    axes.plot(top1, np.full(len(top1), height + 0.1), "o", color=colour, alpha=0.45, markersize=2.6, markeredgewidth=0)
    spread = None if score["std"] is None else 100 * score["std"]
    axes.errorbar(
        100 * score["mean"], height, xerr=spread, fmt=marker, color=colour, markersize=4.6, capsize=2.5, linewidth=1.2
    )


def _accuracy_legend(comparison: Mapping[str, Any], kinds: Sequence[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5, label=f"{kind} labels")
        for kind, (colour, marker) in LABEL_STYLE.items()
        if kind in kinds
    ]
    handles.append(Line2D([], [], color="#777777", marker="o", linestyle="none", markersize=2.6, label="one seed"))
    if sum(method["control"] for method in comparison["methods"]) == 1:
        handles.append(Line2D([], [], color="#777777", linestyle=":", linewidth=1, label="random real"))
    if comparison["full_data"]:
        handles.append(Line2D([], [], color="#333333", linestyle="--", linewidth=1, label="all real data"))
    return handles


# -- images -----------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_grids(path: Path, comparison: Mapping[str, Any], grids: Mapping[str, Tensor]) -> None:
    """The images of the methods side by side: the same classes as rows and the same slots as columns."""
    methods = _methods_with_grids(comparison, grids)
    names = comparison["data"]["classes"]
    height, width = next(iter(grids.values())).shape[-2:]
    small, few = max(height, width) <= SMALL_IMAGE, len(methods) <= FEW_METHODS
    classes = min(len(names), MAX_CLASSES if small and few else FEW_CLASSES)
    most = MAX_SLOTS if small and few else FEW_SLOTS
    labels = [_name(name, f"class {k}", 18) for k, name in enumerate(names[:classes])]
    slots = min(most, max(method["ipc"] for method in methods))
    cell = min(0.5, max(0.28 if small else 0.54, 1.5 / slots))
    across, down = slots * cell, classes * cell * (height + 1) / (width + 1)
    step = max(1.7, across + 0.14)
    titles = [_grid_title(method, comparison, most, int((step - 0.1) / 0.056)) for method in methods]
    left, above = 0.2 + 0.068 * max(map(len, labels)), 0.14 + 0.14 * max(title.count("\n") + 1 for title in titles)
    columns = max(1, min(len(methods), int((WIDTH - left) // step)))
    rows = math.ceil(len(methods) / columns)
    columns = math.ceil(len(methods) / rows)
    wide, high = left + columns * step, rows * (down + above) + 0.3
    figure = Figure(figsize=(wide, high))
    for place, (method, title) in enumerate(zip(methods, titles, strict=True)):
        x, y = left + place % columns * step, high - (place // columns + 1) * (down + above)
        axes = figure.add_axes((x / wide, y / high, across / wide, down / high))
        picture = _part(grids[method["label"]], method, classes, most)
        _draw_panel(axes, picture, slots * (width + 1) - 1, title)
        if place % columns == 0:
            axes.set_yticks(np.arange(classes) * (height + 1) + height / 2, labels)
    if classes < len(names):
        figure.text(left / wide, 0.1 / high, f"the first {classes} of {len(names)} classes")
    save_figure(figure, path)


def _methods_with_grids(comparison: Mapping[str, Any], grids: Mapping[str, Tensor]) -> list[Mapping[str, Any]]:
    methods = in_order(comparison)
    unknown = set(grids) - {method["label"] for method in methods}
    missing = {method["label"] for method in methods if method["control"]} - set(grids)
    if unknown or missing:
        raise ValueError(
            f"grids hold images of the methods compared, the controls among them; unknown: {sorted(unknown)}, "
            f"controls without images: {sorted(missing)}"
        )
    return [method for method in methods if method["label"] in grids]


def _part(images_uint8: Tensor, method: Mapping[str, Any], classes: int, slots: int) -> NDArray[np.uint8]:
    """(K * ipc, C, H, W) -> picture (H', W') or (H', W', C) of the first classes and slots."""
    ipc = method["ipc"]
    if len(images_uint8) % ipc:
        raise ValueError(f"{method['label']!r} has {len(images_uint8)} images, which is no multiple of its ipc {ipc}")
    cut = images_uint8.view(-1, ipc, *images_uint8.shape[1:])[:classes, :slots]
    picture = grid(cut.flatten(0, 1).cpu(), min(ipc, slots)).numpy()
    return picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)


def _draw_panel(axes: Axes, picture: NDArray[np.uint8], wide: int, title: str) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    axes.set_xlim(-0.5, wide - 0.5)  # one scale for all panels
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=8)


def _grid_title(method: Mapping[str, Any], comparison: Mapping[str, Any], most: int, letters: int) -> str:
    """What the images are, in lines of so many letters."""
    cut = f"\nfirst {most} of {method['ipc']} slots" if method["ipc"] > most else ""
    lines = _title(method, comparison, 30).split("\n")
    return "\n".join(textwrap.fill(line, letters) for line in lines) + cut


# -- similarity -------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_similarity(path: Path, comparison: Mapping[str, Any]) -> None:
    """How alike the pairs inside a class are, a panel per method, with real images behind it."""
    methods = [method for method in in_order(comparison) if method["histogram"]]
    figure, panels = _small_multiples(len(methods), columns=3, high=1.65)
    real = comparison["real"] or {}
    for axes, method in zip(panels, methods, strict=False):
        colour = "#555555" if method["control"] else LABEL_STYLE["soft"][0]
        if real.get("histogram"):
            axes.stairs(**_stairs(real["histogram"]), fill=True, color="#cccccc", label="real")
        axes.stairs(**_stairs(method["histogram"]), color=colour, linewidth=1.4, label="method")
        means = [(real.get("similarity"), "#999999"), (method["similarity"], colour)]
        for similarity, tint in means:
            if similarity and similarity["mean"] is not None:
                axes.axvline(similarity["mean"], color=tint, linestyle="--", linewidth=1)
        axes.set_title(_title(method, comparison, 36), loc="left", fontsize=8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    low, high = _span([method["histogram"] for method in methods] + [real.get("histogram")])
    panels[0].set_xlim(low, high)
    handles = [
        Line2D([], [], color=LABEL_STYLE["soft"][0], linewidth=1.4, label="images of the method"),
        Line2D([], [], color="#555555", linewidth=1.4, label="random real (control)"),
        Line2D([], [], color="#cccccc", linewidth=6, label="real training images"),
        Line2D([], [], color="#777777", linestyle="--", linewidth=1, label="mean"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("cosine similarity of two images of a class (each panel has its own height)", fontsize=8)
    save_figure(figure, path)


def _stairs(histogram: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": np.asarray(histogram["density"], dtype=float), "edges": np.asarray(histogram["edges"], dtype=float)}


def _span(histograms: Sequence[Mapping[str, Any] | None]) -> tuple[float, float]:
    """Where any histogram has mass."""
    ends = [
        end
        for histogram in histograms
        if histogram
        for left, right, mass in zip(histogram["edges"][:-1], histogram["edges"][1:], histogram["density"], strict=True)
        if mass > 0
        for end in (left, right)
    ]
    low, high = (min(ends), max(ends)) if ends else (-1.0, 1.0)
    edge = 0.02 * (high - low)
    return low - edge, high + edge


# -- feature map ------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_map(path: Path, comparison: Mapping[str, Any]) -> None:
    """Where the images of each method lie among real ones, a panel per method, colour by class."""
    methods = [method for method in in_order(comparison) if _points(method) is not None]
    names = comparison["data"]["classes"]
    classes = min(len(names), MAX_CLASSES)
    palette = np.asarray(colormaps["tab10" if classes <= 10 else "tab20"].colors)[:classes]  # type: ignore[attr-defined]
    figure, panels = _small_multiples(len(methods), columns=4, high=None)
    real = _points(comparison["real"] or {}, classes)
    for axes, method in zip(panels, methods, strict=False):
        points = _points(method, classes)
        assert points is not None
        if real is not None:
            axes.scatter(*real[0].T, c=0.62 + 0.38 * palette[real[1]], s=5, linewidths=0, zorder=1)
        size = float(np.clip(2400 / max(1, len(points[0])), 7, 26))
        axes.scatter(*points[0].T, c=palette[points[1]], s=size, linewidths=0.5, edgecolors="#222222", zorder=2)
        axes.set_title(_title(method, comparison, 36), loc="left", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color="#bbbbbb")
    figure.legend(handles=_class_legend(names[:classes], palette), loc="outside lower center", ncols=5, frameon=False)
    if classes < len(names):
        figure.suptitle(f"the first {classes} of {len(names)} classes", fontsize=8)
    save_figure(figure, path)


def _class_legend(names: Sequence[str], palette: NDArray[np.float64]) -> list[Line2D]:
    return [
        Line2D([], [], color=tuple(palette[k]), marker="o", linestyle="none", label=_name(name, f"class {k}"))
        for k, name in enumerate(names)
    ]


def _points(entry: Mapping[str, Any], classes: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Finite points (N, 2) with their labels (N,), of the first classes; `None` if there are none at all."""
    points = entry.get("points")
    if not points or not points["xy"]:
        return None
    xy, labels = np.asarray(points["xy"], dtype=float).reshape(-1, 2), np.asarray(points["label"], dtype=np.int64)
    kept = np.isfinite(xy).all(1) & (labels >= 0) & (labels < (classes or labels.max() + 1))
    return xy[kept], labels[kept]


# -- parts ------------------------------------------------------------------------------------------------------------


def _small_multiples(count: int, *, columns: int, high: float | None) -> tuple[Figure, NDArray[Any]]:
    """A figure of `count` panels with the same axes, `high` inches each, or square."""
    rows = math.ceil(count / columns)
    columns = max(2, math.ceil(count / rows))
    tall = WIDTH / columns if high is None else high
    figure = Figure(figsize=(WIDTH, rows * tall + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=high is None).ravel()
    for place, axes in enumerate(panels):
        axes.set_visible(place < count)
        axes.tick_params(labelbottom=place + columns >= count)
    return figure, panels


def _title(method: Mapping[str, Any], comparison: Mapping[str, Any], most: int = 60) -> str:
    """The label of a method and what sets it apart; in two lines if one would be longer than `most` letters."""
    name = _name(method["label"], f"method {comparison['methods'].index(method) + 1}", 34)
    remarks = ["control"] if method["control"] else []
    if len({other["ipc"] for other in comparison["methods"]}) > 1 and f"ipc {method['ipc']}" not in method["label"]:
        remarks.append(f"ipc {method['ipc']}")
    if not remarks:
        return name
    remark = f"({', '.join(remarks)})"
    return name + ("\n" if len(name) + len(remark) >= most else " ") + remark


def _name(text: str, otherwise: str, most: int = 24) -> str:
    return plain_name(visible(text), otherwise, most=most)


def _scored(comparison: Mapping[str, Any]) -> set[str]:
    return {score["method"] for score in comparison["scores"]}


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
