"""Shared parts of the cards: templates, YAML headers and escaping of untrusted text; no network access."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..runtime import count_text, dump_yaml, visible

_LICENSES = ("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "mit", "apache-2.0", "bsd-3-clause", "odc-by")
"""License ids of the Hub that are used as they are; any other license becomes `other` with a `license_name`."""
_LINK = re.compile(r":(?=//)|@|(?<=www)\.", re.IGNORECASE)
_LINE_START = re.compile(r"^(\d*)([-=.)])")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def render(template: str, values: Mapping[str, object]) -> str:
    """Return the body of a card; a value that the template uses but `values` lacks is a `jinja2.UndefinedError`."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["counted"] = count_text
    environment.filters["or_dash"] = lambda value: "-" if value is None else value
    text = files("prism_hf.hub").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def checked_header(values: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Return the header values that are not `None`, in the order of `allowed`; any other key is a `ValueError`."""
    extra = set(values) - set(allowed)
    if extra:
        raise ValueError(f"metadata keys {sorted(extra)} are not in the allow-list")
    # A round trip through JSON leaves plain types only, whatever classes the library used.
    plain = json.loads(json.dumps(values))
    return {key: plain[key] for key in allowed if plain.get(key) is not None}


def with_header(header: Mapping[str, Any], body: str) -> str:
    """Return the card: the header, followed by the body."""
    return f"---\n{dump_yaml(header)}---\n\n{body}"


def license_keys(text: str) -> dict[str, Any]:
    """Return the header keys `license` and `license_name`: an id of the Hub, or `other` with the slug of the name."""
    wanted = slug(text)
    known = wanted in _LICENSES
    return {"license": wanted if known else "other", "license_name": None if known else wanted}


def slug(text: str) -> str:
    """Turn text into an id of lowercase letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.strip().lower()).strip("-.")[:80] or "unknown"


def escape(text: object) -> str:
    """Escape any text so that it appears literally on one line of Markdown or HTML, also inside a table."""
    line = _MARKDOWN.sub(r"\\\1", " ".join(visible(str(text)).split()))
    # At the start of a line, a dash, an equals sign or a number with a dot would start a list, a rule or a heading.
    line = _LINE_START.sub(r"\1\\\2", line)
    # URLs, email addresses and @names would otherwise be turned into links.
    return _LINK.sub(lambda sign: f"&#{ord(sign[0])};", html.escape(line, quote=False))


def class_list(names: Sequence[str], counts: Sequence[int] = ()) -> str:
    """Return the classes as a collapsed list, numbered by label, with the number of images of each if `counts` is given."""
    sizes = [f" ({count:,})" for count in counts] or [""] * len(names)
    lines = [f"{label}. {escape(name)}{size}" for label, (name, size) in enumerate(zip(names, sizes, strict=True))]
    what = " and the number of training images of each" if counts else ""
    summary = f"<details><summary>All {len(names)} classes by label{what}</summary>"
    return "\n".join([summary, "", *lines, "", "</details>"])


def fence_for(text: str) -> str:
    """Return a code fence that is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
