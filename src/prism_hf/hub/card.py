"""A card, of a dataset or of a network: template, YAML header and escaped text from outside; no network."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..runtime import dump_yaml, visible

_LICENSES = ("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "mit", "apache-2.0", "bsd-3-clause", "odc-by")
"""License ids of the Hub that a source may name; anything else becomes `other` with its name."""
_LINK = re.compile(r":(?=//)|@|(?<=www)\.", re.IGNORECASE)
_LINE_START = re.compile(r"^(\d*)([-=.)])")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def render(template: str, values: Mapping[str, object]) -> str:
    """The body of a card; a value that the template names and that is not there is a `jinja2.UndefinedError`."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["or_dash"] = lambda value: "-" if value is None else value
    text = files("prism_hf.hub").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def checked_header(values: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """The values of a header that are known, in the order of the allow-list; a key outside is a `ValueError`."""
    extra = set(values) - set(allowed)
    if extra:
        raise ValueError(f"metadata keys {sorted(extra)} are not in the allow-list")
    # Through JSON: plain types only, whatever the library put into its classes.
    plain = json.loads(json.dumps(values))
    return {key: plain[key] for key in allowed if plain.get(key) is not None}


def with_header(header: Mapping[str, Any], body: str) -> str:
    """The card: its header, and its body below."""
    return f"---\n{dump_yaml(header)}---\n\n{body}"


def license_keys(text: str) -> dict[str, Any]:
    """`license` and `license_name` of a card's header: an id of the Hub, or `other` with the name made an id."""
    wanted = slug(text)
    known = wanted in _LICENSES
    return {"license": wanted if known else "other", "license_name": None if known else wanted}


def slug(text: str) -> str:
    """Text as an id of lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.strip().lower()).strip("-.")[:80] or "unknown"


def escape(text: object) -> str:
    """Text that shows as itself in one line of Markdown or HTML, inside a table too, whatever it contains."""
    line = _MARKDOWN.sub(r"\\\1", " ".join(visible(str(text)).split()))
    # A dash, an equals sign or a number with a dot would open a list, a rule or a heading at the start of a line.
    line = _LINE_START.sub(r"\1\\\2", line)
    # Addresses and @names would become links on their own.
    return _LINK.sub(lambda sign: f"&#{ord(sign[0])};", html.escape(line, quote=False))


def fence_for(text: str) -> str:
    """A code fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
