"""Merge a generated card into the README on the Hub and keep what other people wrote there; no network access."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..runtime import YamlError, dump_yaml, read_yaml

BEGIN = "<!-- prism-hf: made by the program from here on; write above this line, or below the last one -->"
END = "<!-- prism-hf: made by the program up to here -->"

_FIRST, _LAST = (rf"^[ \t]*{re.escape(line)}[ \t]*$" for line in (BEGIN, END))
_MARKER = re.compile(rf"(?:{_FIRST}|{_LAST})\n?", re.MULTILINE)
# The first pair of markers without another BEGIN in between. People wrote the text outside it.
_BLOCK = re.compile(rf"{_FIRST}(?:(?!{_FIRST}).)*?{_LAST}\n?", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_UNREADABLE = ("self", "ignore_metadata_errors")
"""Header keys that break the card classes of huggingface_hub, whose constructors have parameters of these names."""


def merge_readme(ours: str, theirs: bytes | None, *, owned: Collection[str]) -> bytes:
    """Return the README to publish: our card, and what other people wrote in `theirs`, the README on the Hub.

    The text of `theirs` outside the two marker lines is kept, or all of it if there is no such pair. Its tags, configs and
    their `dataset_info` are kept too, and so are all header keys except `owned`, which only prism-hf may set or remove.
    Text around our card in the local file is published with the first version only; after that, edit the README on the Hub.
    If nothing would change, `theirs` itself is returned, so merging twice is the same as merging once.
    """
    header, body = _parse(_as_text(ours.encode()))
    kept, written = _parse(_as_text(theirs or b""))
    block, older = block_of(body), _BLOCK.search(written)
    if older:
        text = _unmarked(written[: older.start()]) + block + _unmarked(written[older.end() :])
    else:
        beside = _BLOCK.split(body, maxsplit=1) if _BLOCK.search(body) else []
        around = (_unmarked(part).strip() for part in (*beside, written))
        text = "\n" + "\n".join([block, *(f"{part}\n" for part in around if part)])
    merged = _merge_headers(header, kept, owned)
    if theirs is not None and (merged, text) == (kept, written):
        return theirs  # a different order of keys or different line endings need no commit
    return f"---\n{dump_yaml(merged)}---\n{text}".encode()


def block_of(body: str) -> str:
    """Return the body of a card between the two marker lines, as a README contains it."""
    match = _BLOCK.search(body)
    return match[0] if match else f"{BEGIN}\n\n{_unmarked(body).strip()}\n\n{END}\n"


def _unmarked(text: str) -> str:
    """Remove all marker lines: a stray one would move the bounds of our part at the next merge."""
    return _MARKER.sub("", text)


def _as_text(data: bytes) -> str:
    """Decode a README from any of the usual encodings and normalize its line endings."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", errors="replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(text: str) -> tuple[dict[str, Any], str]:
    """Split a README into header and body; a header that is not a YAML mapping is kept as part of the body."""
    match = _HEADER.match(text)
    if match is None:
        return {}, text
    try:
        header = read_yaml(match[1])
    except YamlError:
        return {}, text
    return (header or {}, text[match.end() :]) if isinstance(header, dict | None) else ({}, text)


def _merge_headers(ours: Mapping[str, Any], theirs: Mapping[Any, Any], owned: Collection[str]) -> dict[str, Any]:
    """Merge the keys of `theirs` into our header, except those that would break `load_dataset`."""
    taken = {*owned, *ours, *_UNREADABLE}
    merged = {**ours, **{key: value for key, value in theirs.items() if isinstance(key, str) and key not in taken}}
    for key in ("tags", "configs", "dataset_info"):
        if key in ours:
            merged[key] = [*ours[key], *_others(key, ours[key], theirs.get(key))]
    return merged


def _others(key: str, ours: list[Any], theirs: Any) -> list[Any]:
    """Return the entries of a header list that are not ours."""
    entries = theirs if isinstance(theirs, list) else [theirs] if isinstance(theirs, dict) else []
    if key == "tags":
        return [tag for tag in entries if isinstance(tag, str) and tag not in ours]
    names = {entry["config_name"] for entry in ours}
    # Only our config may be the default: `load_dataset` refuses a repo with two.
    return [
        {k: v for k, v in entry.items() if k != "default"}
        for entry in entries
        if isinstance(entry, dict) and isinstance(name := entry.get("config_name", "default"), str) and name not in names
    ]
