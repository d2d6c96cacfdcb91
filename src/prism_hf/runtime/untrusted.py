"""Checks of untrusted files: names, paths, links and cards are validated here before anything follows them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import DataError
from .plain_yaml import read_header

_LONGEST_NAME = 200
_ELSEWHERE = re.compile(r"^[/\\~]|^\w[\w+.-]*:[/\\]|::")
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and characters that change the direction of the text after them."""


def visible(text: str) -> str:
    """Replace every invisible character that changes how the rest of a text is displayed with a visible mark (U+FFFD)."""
    return _UNSEEN.sub("\ufffd", text)


def read_card(text: str) -> dict[str, Any]:
    """Return a card's header as huggingface_hub and `datasets` read it (YAML 1.1), or raise a one-line `ValueError`."""
    if read_header(text) is None:  # read with our limits first, since the library follows any number of aliases
        return {}
    from huggingface_hub import DatasetCard

    try:
        return DatasetCard(text).data.to_dict()
    except Exception as error:  # untrusted text can raise anything in the library's YAML reader and classes
        raise ValueError(" ".join(str(error).split())) from error


def foreign_files(header: Mapping[str, Any]) -> list[str]:
    """Return the paths outside the folder in the `configs` of a card's header: `datasets` follows any path or URL there."""
    configs = header.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    paths = [config.get(key) for config in configs for key in ("data_files", "data_dir")]
    return [text for text in texts_in(paths) if _ELSEWHERE.search(text) or ".." in re.split(r"[/\\]", text)]


def texts_in(value: object) -> Iterator[str]:
    """Yield all strings inside plain JSON, except for keys."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain JSON with `change` applied to every string in it, except for keys."""
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def without_password(address: str) -> str:
    """Return a URL without its user name and password, so that it can be shown."""
    return re.sub("//[^/@]*@", "//", address)


def is_plain_path(name: object) -> bool:
    """Return whether a name is a path of printable characters below a folder, on any operating system."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        return False
    parts = name.split("/")
    return "\\" not in name and not PureWindowsPath(name).drive and not {"", ".", ".."} & set(parts)


def local_folder(source: str | Path) -> Path | None:
    """Return the folder that a source names, or `None` if there is none or it cannot be a path (too long, no such home)."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.isdir(path) else None


def folder_or_hub_id(source: str, what: str, *, give: str = "a Hub id or the path of a folder") -> Path | None:
    """Return the folder that a source names, or `None` for a Hub id. Anything else is a `DataError` about `what`."""
    folder = local_folder(source)
    if folder is None and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise DataError(f"{what} is neither a folder here nor a Hub id (org/name); give {give}")
    return folder


def homes_of(folder: Path) -> tuple[Path, ...]:
    """Return the folders where a folder's files may really be: itself and, for a snapshot in the Hub cache, its blobs."""
    real = Path(os.path.realpath(folder))
    snapshots = (path for path in (real, *real.parents) if path.name == "snapshots")
    # The blobs of its repo, and the blobs shared by all repos.
    return (real, *(above / "blobs" for path in snapshots for above in path.parents[:2]))


def is_inside(path: Path, homes: tuple[Path, ...]) -> bool:
    """Return whether a path, with all links resolved, is in one of these folders; see `homes_of`."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(home) for home in homes)


def stray_link(folder: Path) -> Path | None:
    """Return a link below a folder that leads out of it, or `None`. Hidden links are ignored, since nothing reads them."""
    homes = homes_of(folder)
    links = (Path(entry.path) for entry in visible_entries(folder) if entry.is_symlink())
    return next((link for link in links if not is_inside(link, homes)), None)


def visible_entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files, folders and links below a folder. Skip hidden ones, and do not follow links."""
    for entry in list(os.scandir(folder)):  # reading the iterator to its end closes it
        if not entry.name.startswith("."):
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from visible_entries(entry.path)
