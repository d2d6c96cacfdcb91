"""Page of a comparison: Markdown with separate figures, and the same text as one self-contained HTML file.

All untrusted text (labels, class names, notes, recipes) is escaped where a template prints it. The HTML is made from the
Markdown by a parser that supports neither raw HTML nor links.
"""

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from torch import Tensor

from ..evaluation import DDRanking, bytes_text, cosine_text, markdown_table, percent_text, top1_text, verdict
from ..hub import escape, fence_for
from ..runtime import count_text, duration_text, visible, write_bytes, write_json
from .figures import draw_comparison, in_order, picture_names

HEADER = (
    "method", "top-1 %", "labels", "student", "ipc", "images", "image bytes", "label bytes", "s / image",
    "intra-class cos", "verifier %",
)  # fmt: skip
"""Columns of the table; the most important ones come first, so that a narrow screen shows them."""

_OUTCOMES = {"wins": "wins", "level": "is level", "loses": "loses"}
_NAMED = 4
"""Most methods named in the title."""
_SYNTAX = ("heading", "list", "fence", "table", "emphasis", "image", "escape", "entity")
"""The Markdown rules that are enabled for the HTML page."""
_SCROLLS = 'class="wide" tabindex="0" role="region" aria-label="{}"'
"""Attributes of a box that scrolls sideways, also by keyboard."""
_FOLD = re.compile(r"<details><summary>[\w -]+</summary>|</details>")
"""The only HTML in the Markdown template; untrusted text contains no `<` after `escape`."""


def write_page(folder: Path, comparison: Mapping[str, Any], images: Mapping[str, Tensor]) -> None:
    """Write comparison.json, the page as Markdown and as one HTML file, and its figures in assets/; see `findings`."""
    write_json(folder / "comparison.json", comparison)
    pictures = draw_comparison(folder / "assets", comparison, images)
    write_bytes(folder / "comparison.md", render_markdown(comparison).encode())
    contents = {name: path.read_bytes() for name, path in pictures.items()}
    write_bytes(folder / "comparison.html", render_html(comparison, contents).encode())


def render_markdown(comparison: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """Render the page as Markdown; `pictures` are the figures' addresses by name, by default those in assets/.

    An unknown fact must be `None`; a missing key raises KeyError or jinja2.UndefinedError.
    """
    if pictures is None:
        pictures = {name: f"assets/{name}.png" for name in picture_names(comparison)}
    scores, protocol = comparison["scores"], comparison["protocol"]
    settings = {f"labels, {key}": value for key, value in protocol["relabel"].items()}
    settings |= {f"evaluation, {key}": value for key, value in protocol["evaluation"].items()}
    for name, top1 in protocol["teachers"].items():
        measured = "not measured" if top1 is None else f"{percent_text(top1)} %"
        settings[f"teacher {name}"] = Markup(f"test top-1 {measured}")
    seeds = {tuple(score["seeds"]) for score in [*scores, *comparison["full_data"]]}
    against_controls, against_each_other = _verdicts(comparison)
    return _TEMPLATES.get_template("comparison.md.jinja").render(
        **comparison,
        title=title_of(comparison),
        version=[f"{key} {text}" for key in ("config", "revision") if (text := comparison["data"].get(key)) is not None],
        pictures=pictures,
        controls=sum(method["control"] for method in comparison["methods"]),
        against_controls=against_controls,
        against_each_other=against_each_other,
        table=Markup(markdown_table(table_of(comparison, escape))),
        ranking=Markup(markdown_table(ranking_of(comparison))) if comparison["methods"] else None,
        students=list(dict.fromkeys(score["student"] for score in scores)),
        seeds=next(iter(seeds)) if len(seeds) == 1 else None,
        one_seed=any(len(row) == 1 for row in seeds),
        spread=any(len(row) > 1 for row in seeds),
        verdicts=sum(entry["half_width"] is not None for entry in comparison["differences"]),
        several_sets=any(score.get("teacher_seeds") for score in scores),
        image_labels=any(score["labels"] == "image" for score in scores),
        real_cosine=Markup(cosine_text(comparison["real"]["similarity"]["mean"])),
        settings=settings,
        made_with={**comparison["versions"], **comparison["hardware"], "time": duration_text(comparison["wall_time_s"])},
        code=_code,
    )


def render_html(comparison: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Render the page as one HTML file without scripts or network access; `pictures` are PNG files by name."""
    parser = MarkdownIt("zero").enable(_SYNTAX)
    tokens = parser.parse(render_markdown(comparison, {name: name for name in pictures}))
    body = Markup(parser.renderer.render(_with_html(tokens, pictures), parser.options, {}))
    title = Markup.escape(visible(title_of(comparison)))
    return _TEMPLATES.get_template("comparison.html.jinja").render(title=title, body=body)


def title_of(comparison: Mapping[str, Any]) -> str:
    """Return the title, not escaped: the methods and the data, without the control unless nothing else was run."""
    methods = comparison["methods"]
    labels = [method["label"] for method in methods if not method["control"]] or [method["label"] for method in methods]
    if len(labels) > _NAMED:
        labels = [*labels[:_NAMED], count_text(len(labels) - _NAMED, "more method")]
    names = " and ".join(filter(None, [", ".join(labels[:-1]), *labels[-1:]]))
    return f"{names or 'No methods'} on {comparison['data']['source']}"


def _with_html(tokens: Sequence[Token], pictures: Mapping[str, bytes]) -> list[Token]:
    """Add what Markdown cannot express: embedded figures, collapsed parts, header cells, and boxes that scroll."""
    result = []
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            result.append(Token("html_block", "", 0, content=f"<div {_SCROLLS.format('Table')}>\n"))
        elif token.type == "paragraph_open" and any(c.type == "image" for c in tokens[index + 1].children or ()):
            token.attrs = {"class": "wide", "tabindex": "0", "role": "group", "aria-label": "Figure"}
        elif token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type == "td_open" and tokens[index - 1].type == "tr_open":
            token.attrSet("scope", "row")
            token.tag = tokens[index + 2].tag = "th"
        elif token.type == "inline" and _FOLD.fullmatch(token.content):
            tokens[index - 1].hidden = tokens[index + 1].hidden = True  # no paragraph around it
            token.children = [Token("html_inline", "", 0, content=token.content)]
        for child in token.children or ():
            if child.type == "image":
                data = base64.b64encode(pictures[str(child.attrs["src"])]).decode()
                child.attrs["src"] = f"data:image/png;base64,{data}"
        result.append(token)
        if token.type == "table_close":
            result.append(Token("html_block", "", 0, content="</div>\n"))
    return result


def _as_markdown(value: object) -> str:
    """Return a value for a template: `Markup` unchanged, any other text escaped so that it is displayed literally."""
    if isinstance(value, Markup):
        return value
    text = value_text(value)
    return text if isinstance(value, int | float) else escape(text)


def value_text(value: object) -> str:
    """Format a setting for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str, language: str) -> Markup:
    fence = fence_for(text)
    return Markup(f"{fence}{language}\n{visible(text).rstrip()}\n{fence}")


_TEMPLATES = Environment(
    loader=PackageLoader("prism_hf.compare"),
    undefined=StrictUndefined,
    finalize=_as_markdown,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def _verdicts(comparison: Mapping[str, Any]) -> tuple[list[Markup], list[Markup]]:
    """Return sentences that compare each method with random real images, and the methods with each other."""
    clauses: dict[tuple[str, str, str], list[str]] = {}
    for entry in comparison["differences"]:
        gap, half = entry["difference"], math.inf if entry["half_width"] is None else entry["half_width"]
        outcome = verdict(gap, half)
        clause = f"with {escape(entry['labels'])} labels {100 * gap:+.1f} points"
        if outcome is not None:
            points = f"{100 * gap:+.1f} points (95 % interval ± {100 * half:.1f})"
            clause = f"with {escape(entry['labels'])} labels it **{_OUTCOMES[outcome]}**, {points}"
        clauses.setdefault((entry["a"], entry["b"], entry["student"]), []).append(clause)
    controls = {method["label"] for method in comparison["methods"] if method["control"]}
    several = len({score["student"] for score in comparison["scores"]}) > 1
    against_controls, against_each_other = list[Markup](), list[Markup]()
    for (a, b, student), results in clauses.items():
        suffix = f", student {escape(student)}" if several else ""
        sentence = Markup(f"**{escape(a)}** against {escape(b)}{suffix}: {'; '.join(results)}.")
        (against_controls if b in controls else against_each_other).append(sentence)
    compared = {a for a, b, _ in clauses if b in controls}
    for method in comparison["methods"]:
        if method["label"] not in controls | compared:
            label, ipc = escape(method["label"]), method["ipc"]
            against_controls.append(Markup(f"**{label}** against random real images: no results to compare at ipc {ipc}."))
    return against_controls, against_each_other


def ranking_of(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of DD-Ranking's scores of the first student, header first."""
    rows: list[tuple[str, ...]] = [("method", "HLR", "IOR", "LRS")]
    for method in in_order(comparison):
        values = DDRanking(**method["dd_ranking"])
        rows.append((escape(method["label"]), *("-" if value is None else f"{value:.3f}" for value in values)))
    return rows


def table_of(comparison: Mapping[str, Any], clean: Callable[[str], str] = visible) -> list[tuple[str, ...]]:
    """Return the table, header first; `clean` makes untrusted text safe to display, by default on a terminal."""
    rows: list[tuple[str, ...]] = [HEADER]
    spread = any(score["std"] is not None for score in [*comparison["scores"], *comparison["full_data"]])
    for method in in_order(comparison):
        label = clean(method["label"]) + (" (control)" if method["control"] else "")
        mean, std = cosine_text(method["similarity"]["mean"]), method["similarity"]["std_over_seeds"]
        cosine = mean if std is None else f"{mean} ± {std:.3f}"
        quality = (f"{method['seconds_per_image']:.3g}", cosine, percent_text(method["verifier_top1"]))
        for score in comparison["scores"]:
            if score["method"] == method["label"]:
                label_bytes = "-" if score["labels"] == "hard" else bytes_text(score["label_bytes"])
                size = (str(method["ipc"]), f"{score['count']:,}", bytes_text(method["image_bytes"]), label_bytes)
                top1, student = top1_text(score, remark=spread), clean(score["student"])
                rows.append((label, top1, clean(score["labels"]), student, *size, *quality))
    for score in comparison["full_data"]:
        count = f"{score['count']:,}"
        rows.append(("all real", top1_text(score, remark=spread), "-", clean(score["student"]), "-", count, *["-"] * 5))
    return rows
