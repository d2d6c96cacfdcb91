"""A generated card meets the README on the Hub: our part is replaced, what others wrote stays; no network."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..runtime import YamlError, dump_yaml, read_yaml

BEGIN = "<!-- prism-hf: made by the program from here on; write above this line, or below the last one -->"
END = "<!-- prism-hf: made by the program up to here -->"

_FIRST, _LAST = (rf"^[ \t]*{re.escape(line)}[ \t]*$" for line in (BEGIN, END))
_MARKER = re.compile(rf"(?:{_FIRST}|{_LAST})\n?", re.MULTILINE)
# The first pair with no other beginning in between: what stands outside it is somebody's.
_BLOCK = re.compile(rf"{_FIRST}(?:(?!{_FIRST}).)*?{_LAST}\n?", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_UNREADABLE = ("self", "ignore_metadata_errors")
"""Header keys that the readers of cards choke on: their names are taken in the reader's own code."""


def merge_readme(ours: str, theirs: bytes | None, *, owned: Collection[str]) -> bytes:
    """Our card with what others wrote around it, to be published: `theirs`, from the Hub, itself if it says all already.

    Of theirs, text outside the two marker lines is kept, and all of it if there is no pair of them; so are header keys that
    are not `owned` (ours alone, set now or not), tags, configs and the `dataset_info` of those. What somebody wrote around
    our card in the local file is published with the first version; after that the README on the Hub is the one to edit.
    Merging it again changes nothing.
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
        return theirs  # another order of keys, or other line ends, are no reason for a commit
    return f"---\n{dump_yaml(merged)}---\n{text}".encode()


def block_of(body: str) -> str:
    """A card's body between the marker lines, as it stands in a README."""
    found = _BLOCK.search(body)
    return found[0] if found else f"{BEGIN}\n\n{_unmarked(body).strip()}\n\n{END}\n"


def _unmarked(text: str) -> str:
    """Text without marker lines: a stray one would end or begin our part elsewhere at the next merge."""
    return _MARKER.sub("", text)


def _as_text(data: bytes) -> str:
    """A README's text in any encoding that people save it in, with one kind of line end."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", errors="replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(text: str) -> tuple[dict[str, Any], str]:
    """Header and body; a header that is no YAML mapping counts as body, so that it is not lost."""
    found = _HEADER.match(text)
    if found is None:
        return {}, text
    try:
        header = read_yaml(found[1])
    except YamlError:
        return {}, text
    return (header or {}, text[found.end() :]) if isinstance(header, dict | None) else ({}, text)


def _merge_headers(ours: Mapping[str, Any], theirs: Mapping[Any, Any], owned: Collection[str]) -> dict[str, Any]:
    """Our header with others' keys; those that would keep `load_dataset` from reading it are left out."""
    taken = {*owned, *ours, *_UNREADABLE}
    merged = {**ours, **{key: value for key, value in theirs.items() if isinstance(key, str) and key not in taken}}
    for key in ("tags", "configs", "dataset_info"):
        if key in ours:
            merged[key] = [*ours[key], *_others(key, ours[key], theirs.get(key))]
    return merged


def _others(key: str, ours: list[Any], theirs: Any) -> list[Any]:
    """Entries of a header list that are not ours."""
    entries = theirs if isinstance(theirs, list) else [theirs] if isinstance(theirs, dict) else []
    if key == "tags":
        return [tag for tag in entries if isinstance(tag, str) and tag not in ours]
    names = {entry["config_name"] for entry in ours}
    # One default only, and it is ours: with two, `load_dataset` refuses the repo.
    return [
        {k: v for k, v in entry.items() if k != "default"}
        for entry in entries
        if isinstance(entry, dict) and isinstance(name := entry.get("config_name", "default"), str) and name not in names
    ]
