"""What a comparison of methods says: one page as Markdown, and as HTML in one file that loads nothing from elsewhere.

Both are made from the same facts. All text comes from outside (labels, class names, notes, recipes) and is escaped: for
Markdown before the page is put together, for HTML by the template.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from ..evaluation.report import difference, markdown_table, top1_text, verdict
from ..hub.card import escape, fence_for
from ..hub.figures import MAX_CLASSES
from ..runtime.units import size_text
from ..runtime.untrusted import visible
from .figures import drawn, in_order

HEADER = (
    "method", "student", "labels", "top-1 %", "ipc", "images", "image bytes", "label bytes", "s / image",
    "intra-class cos", "verifier %",
)  # fmt: skip
"""Columns of the table; what matters most stands where a narrow screen shows it."""

_FREE = ("hardware", "versions", "left_out")
_FREE_PROTOCOL = ("teachers", "relabel", "evaluation")
_RAW = ("command", "recipe_yaml")
"""Shown as code, so not escaped as text."""

WORDS = {"wins": "wins", "level": "is level", "loses": "loses"}


def render_markdown(comparison: Mapping[str, Any], *, folder_of_pictures: str = "assets") -> str:
    """The page as Markdown, with its pictures beside it.

    Args:
        comparison: What was found, plain JSON.
        folder_of_pictures: Where `draw_comparison` wrote, as seen from the page.

    Raises:
        KeyError: A fact is missing; one that is not known is there as `None`.
    """
    page = _page(_pairs(comparison), escape)
    return _template("comparison.md.jinja", autoescape=False).render(
        page=page,
        table=markdown_table([HEADER, *(row["cells"] for row in page["rows"])]),
        pictures={name: f"{folder_of_pictures}/{name}.png" for name in drawn(comparison)},
        fence_for=fence_for,
    )


def render_html(comparison: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page as one HTML file that needs neither a network nor scripts.

    Args:
        comparison: What was found, plain JSON.
        pictures: PNG files by name, as `draw_comparison` names them: `accuracy`, `grids`, `similarity`, `map`.

    Raises:
        KeyError: A fact is missing; one that is not known is there as `None`.
    """
    inline = {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()}
    page = _page(_pairs(comparison), str)
    return _template("comparison.html.jinja", autoescape=True).render(page=page, header=HEADER, pictures=inline)


@cache
def _template(name: str, *, autoescape: bool) -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(files("prism_hf.compare").joinpath("templates", name).read_text(encoding="utf-8"))


def table_of(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of the page for a terminal, header first."""
    rows = [tuple(row["cells"]) for row in _rows(comparison, in_order(comparison))]
    return [HEADER, *(tuple(visible(cell) for cell in row) for row in rows)]


# -- text from outside ------------------------------------------------------------------------------------------------


def _pairs(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with its free mappings, whose keys are text from outside too, as lists of pairs."""
    protocol = comparison["protocol"]
    return {
        **comparison,
        **{key: _pairs_of(comparison[key]) for key in _FREE},
        "protocol": {**protocol, **{key: _pairs_of(protocol[key]) for key in _FREE_PROTOCOL}},
    }


def _pairs_of(mapping: Mapping[str, Any] | None) -> list[tuple[str, str | float | None]]:
    """Keys and values; numbers stay numbers, so that they are not escaped."""
    plain = (bool, int, float, type(None))
    return [(str(key), value if isinstance(value, plain) else value_text(value)) for key, value in (mapping or {}).items()]


def _texts(pairs: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    return [(key, value_text(value)) for key, value in pairs]


def value_text(value: object) -> str:
    """A setting as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cleaned(value: Any, how: Callable[[str], str]) -> Any:
    """Every text inside plain JSON made `visible` and escaped; what is shown as code is not escaped."""
    if isinstance(value, str):
        return how(visible(value))
    if isinstance(value, Mapping):
        return {key: visible(item) if key in _RAW else _cleaned(item, how) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_cleaned(item, how) for item in value]
    return value


# -- what the page says -----------------------------------------------------------------------------------------------


def _page(comparison: Mapping[str, Any], how: Callable[[str], str]) -> dict[str, Any]:
    """Everything that both templates show; the texts in it are escaped by `how`."""
    safe = _cleaned(comparison, how)
    methods, names = in_order(safe), safe["data"]["classes"]
    seeds = {tuple(score["seeds"]) for score in [*safe["scores"], *safe["full_data"]]}
    return {
        **{key: safe[key] for key in ("name", "command", "data", "map", "methods")},
        **{key: _texts(safe[key]) for key in _FREE},
        **{key: _texts(safe["protocol"][key]) for key in ("relabel", "evaluation")},
        "teachers": [
            (name, None if top1 is None else f"{100 * top1:.1f} %") for name, top1 in safe["protocol"]["teachers"]
        ],
        "verifier": safe["protocol"]["verifier"],
        "notes": safe["protocol"]["notes"],
        "count": sum(not method["control"] for method in methods),
        "one_control": sum(method["control"] for method in methods) == 1,  # as in the picture
        "has_full": bool(safe["full_data"]),
        "classes": names[:MAX_CLASSES],
        "class_count": len(names),
        "train_count": f"{safe['data']['train_count']:,}",
        "test_count": f"{safe['data']['test_count']:,}",
        "tested_on": safe["data"]["tested_on"],
        "verdicts": [_against_controls(safe, method) for method in methods if not method["control"]],
        "others": list(_against_each_other(safe)),
        "rows": list(_rows(safe, methods)),
        "students": ", ".join(dict.fromkeys(score["student"] for score in safe["scores"])),
        "seeds": ", ".join(map(str, next(iter(seeds)))) if len(seeds) == 1 else None,
        "image_labels": any(score["labels"] == "image" for score in safe["scores"]),
        "one_seed": any(len(own) == 1 for own in seeds),
        "real_cos": None if not safe["real"] else _similarity(safe["real"]["similarity"]),
        "wall_time": None if safe["wall_time_s"] is None else time_text(safe["wall_time_s"]),
    }


def time_text(seconds: float) -> str:
    """`1 h 12 min`, `3 min 5 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _against_controls(comparison: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """A method against the random real images of the same number."""
    controls = [other for other in comparison["methods"] if other["control"] and other["ipc"] == method["ipc"]]
    scores = [score for score in comparison["scores"] if score["method"] == method["label"]]
    clauses = []
    for score in scores:
        for control in controls:
            found = _found_difference(comparison, score, control["label"])
            if found is not None:
                clauses.append(_clause(score, *found))
    missing = (
        "it has no scores" if not scores else f"there is no random-real control at ipc {method['ipc']} with its scores"
    )
    against = " and ".join(control["label"] for control in controls) or "random real images"
    return {"a": method["label"], "b": against, "missing": None if clauses else missing, "students": _by_student(clauses)}


def _found_difference(
    comparison: Mapping[str, Any], score: Mapping[str, Any], other: str
) -> tuple[float, float | None] | None:
    """The difference as the comparison gives it, from either side, or from the two rows of the table."""
    key = (score["student"], score["labels"])
    for entry in comparison["differences"]:
        if (entry["student"], entry["labels"]) == key and {entry["a"], entry["b"]} == {score["method"], other}:
            return (1 if entry["a"] == score["method"] else -1) * entry["difference"], entry["error"]
    for row in comparison["scores"]:
        if row["method"] == other and (row["student"], row["labels"]) == key:
            return difference(score, row)
    return None


def _against_each_other(comparison: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Pairs of methods in the order of `differences`, without the controls."""
    controls = {method["label"] for method in comparison["methods"] if method["control"]}
    wanted = [entry for entry in comparison["differences"] if not {entry["a"], entry["b"]} & controls]
    wanted.sort(key=lambda entry: (entry["a"], entry["b"]))
    for (a, b), entries in groupby(wanted, key=lambda entry: (entry["a"], entry["b"])):
        clauses = [_clause(entry, entry["difference"], entry["error"]) for entry in entries]
        yield {"a": a, "b": b, "missing": None, "students": _by_student(clauses)}


def _clause(row: Mapping[str, Any], gap: float, error: float | None) -> dict[str, Any]:
    """`with soft labels it wins, +1.2 points (standard error 0.4)`, in parts."""
    found = verdict(gap, math.inf if error is None else error)
    points = f"{100 * gap:+.1f} points"
    return {
        "student": row["student"],
        "where": f"with {row['labels']} labels",
        "verdict": found,
        "words": "has no verdict from one seed" if found is None else WORDS[found],
        "points": points if found is None or error is None else f"{points} (standard error {100 * error:.1f})",
    }


def _by_student(clauses: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    students = dict.fromkeys(clause["student"] for clause in clauses)
    return [(name, [clause for clause in clauses if clause["student"] == name]) for name in students]


# -- the table --------------------------------------------------------------------------------------------------------


def _rows(comparison: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for method in methods:
        own = [score for score in comparison["scores"] if score["method"] == method["label"]]
        for score in own or [None]:
            yield {"control": method["control"], "full": False, "cells": _cells(method, score)}
    for score in comparison["full_data"]:
        cells = ("all real", score["student"], "-", top1_text(score), "-", f"{score['count']:,}", *["-"] * 5)
        yield {"control": False, "full": True, "cells": cells}


def _cells(method: Mapping[str, Any], score: Mapping[str, Any] | None) -> tuple[str, ...]:
    seconds, verifier = method["seconds_per_image"], method["verifier_top1"]
    hard = score is not None and score["labels"] == "hard"
    return (
        method["label"] + (" (control)" if method["control"] else ""),
        "-" if score is None else score["student"],
        "-" if score is None else score["labels"],
        "not yet run" if score is None else top1_text(score),
        str(method["ipc"]),
        "-" if score is None else f"{score['count']:,}",
        _bytes(method["image_bytes"]),
        "-" if hard else _bytes(method["label_bytes"]),
        "-" if seconds is None else f"{seconds:.3g}",
        _similarity(method["similarity"]),
        "-" if verifier is None else f"{100 * verifier:.1f}",
    )


def _bytes(count: float | None) -> str:
    return "-" if count is None else size_text(count)


def _similarity(similarity: Mapping[str, Any] | None) -> str:
    if not similarity or similarity["mean"] is None:
        return "-"
    spread = similarity.get("std_over_seeds")
    return f"{similarity['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
