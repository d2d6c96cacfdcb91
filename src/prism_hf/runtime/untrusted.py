"""Bounds and links of foreign files: names, paths and cards are checked here before anything follows them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from .plain_yaml import read_header

_LONGEST_NAME = 200
_ELSEWHERE = re.compile(r"^[/\\~]|^\w[\w+.-]*:[/\\]|::")
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of what follows."""


def visible(text: str) -> str:
    """Text with a mark in the place of each letter that is not seen but changes how the rest is read."""
    return _UNSEEN.sub("\ufffd", text)


def read_card(text: str) -> dict[str, Any]:
    """A card's header as huggingface_hub and `datasets` read it, by YAML 1.1, or a `ValueError` of one line."""
    if read_header(text) is None:  # read by us first, since the library follows aliases without end
        return {}
    from huggingface_hub import DatasetCard

    try:
        return DatasetCard(text).data.to_dict()
    except Exception as error:  # what YAML readers and the classes of the library make of foreign text
        raise ValueError(" ".join(str(error).split())) from error


def foreign_files(header: Mapping[str, Any]) -> list[str]:
    """What the `configs` in a card's header take from elsewhere: `datasets` follows any path and address there."""
    configs = header.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    named = [config.get(key) for config in configs for key in ("data_files", "data_dir")]
    return [text for text in texts_in(named) if _ELSEWHERE.search(text) or ".." in re.split(r"[/\\]", text)]


def texts_in(value: object) -> Iterator[str]:
    """All strings inside plain JSON, keys aside."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain JSON with every string inside changed, keys aside."""
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def without_password(address: str) -> str:
    """An address as it may be shown."""
    return re.sub("//[^/@]*@", "//", address)


def is_plain_path(name: object) -> bool:
    """Whether a name is a path of ordinary characters below a folder, on any system."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        return False
    parts = name.split("/")
    return "\\" not in name and not PureWindowsPath(name).drive and not {"", ".", ".."} & set(parts)


def homes_of(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may really lie: in it, or, if it is a snapshot in the Hub's cache, among its blobs."""
    real = Path(os.path.realpath(folder))
    snapshots = (path for path in (real, *real.parents) if path.name == "snapshots")
    # The blobs of its repo, and those that all repos share.
    return (real, *(above / "blobs" for path in snapshots for above in path.parents[:2]))


def is_inside(path: Path, homes: tuple[Path, ...]) -> bool:
    """Whether a path, all links followed, ends in one of these folders; see `homes_of`."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(home) for home in homes)


def stray_link(folder: Path) -> Path | None:
    """A link below a folder that leads out of it; hidden ones do not count, nobody reads them."""
    homes = homes_of(folder)
    links = (Path(entry.path) for entry in visible_entries(folder) if entry.is_symlink())
    return next((link for link in links if not is_inside(link, homes)), None)


def visible_entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Files, folders and links below a folder, hidden ones and what links lead to left out."""
    for entry in list(os.scandir(folder)):  # read to its end, which closes it
        if not entry.name.startswith("."):
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from visible_entries(entry.path)
