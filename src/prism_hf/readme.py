"""How a generated card meets the README on the Hub: our part is replaced, what others wrote stays; pure, no network."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from huggingface_hub import RepoCard

BEGIN = "<!-- prism-hf: made by the program from here on; write above this line, or below the last one -->"
END = "<!-- prism-hf: made by the program up to here -->"

# From the first marker line to the last: whatever a recipe inside our part contains, it cannot end the part early.
_BLOCK = re.compile(rf"^{re.escape(BEGIN)}$.*^{re.escape(END)}$\n?", re.MULTILINE | re.DOTALL)


def merge_readme(ours: str, theirs: str | None, *, owned: Collection[str]) -> str:
    """Our card with what others wrote around it.

    Args:
        ours: A generated card: YAML header and body.
        theirs: README.md on the Hub, or `None`. Text outside the two marker lines is kept; so is all of it if there are no
            markers.
        owned: Header keys that are ours alone, whether we set them now or not. Others' keys are kept, and so are their
            tags, their configs and the `dataset_info` of those.

    Returns:
        The README to publish. Merging it again changes nothing.
    """
    _, header, body = _parse(ours)
    written, kept, text = _parse(theirs or "")
    block = block_of(body)
    found = _BLOCK.search(text)
    if found:
        text = text[: found.start()] + block + text[found.end() :]
    else:
        text = f"\n{block}" + (f"\n{text.strip()}\n" if text.strip() else "")
    # What somebody wrote around our part in the local file comes along, once.
    for part in _BLOCK.split(body) if _BLOCK.search(body) else ():
        if part.strip() and part.strip() not in text:
            text += f"\n{part.strip()}\n"
    merged = _merge_headers(header, kept, owned)
    if merged == kept:  # as others have written it: another order of keys is no reason for a commit
        return f"{written}{text}"
    return f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)}---\n{text}"


def block_of(body: str) -> str:
    """A card's body between the marker lines, as it stands in a README."""
    found = _BLOCK.search(body)
    return found[0] if found else f"{BEGIN}\n\n{body.strip()}\n\n{END}\n"


def _parse(text: str) -> tuple[str, dict[str, Any], str]:
    """Header as written, header as read, body; a header that is no YAML mapping counts as body, so that it is not lost."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        # Without a header the library would warn about its absence on every first push.
        card = RepoCard(text) if text.lstrip().startswith("---") else None
    except (ValueError, yaml.YAMLError):
        card = None
    return ("", {}, text) if card is None else (text.removesuffix(card.text), card.data.to_dict(), card.text)


def _merge_headers(ours: Mapping[str, Any], theirs: Mapping[str, Any], owned: Collection[str]) -> dict[str, Any]:
    merged = dict(ours) | {key: value for key, value in theirs.items() if key not in owned and key not in ours}
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
        if isinstance(entry, dict) and entry.get("config_name", "default") not in names
    ]
