"""How files reach the disk: whole, or not at all; and how a file that changed since then is found out."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import DamagedError, OutputError

log = logging.getLogger(__name__)
DRAFT = ".draft-"
"""Names of unfinished files and folders begin so; a process that was killed leaves them, the next launch clears them."""
SEAL = ".seal"
"""A sealed file has a second one beside it: its SHA-256, and what it was made from."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into one line that helps.

    Raises:
        OutputError: The disk is full, a quota or size limit is reached, or the place cannot be written.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL or "No space left" in reason or "File too large" in reason:
            raise OutputError(
                f"{path} cannot be written ({reason}); what is finished stays good: make space and give the same command "
                "again"
            ) from error
        raise OutputError(f"{path} cannot be written ({reason}); make it writable, or use another folder") from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: a reader sees the old file or the new one.

    Raises:
        OutputError: It cannot be written; the old file stays.
    """
    with _drafted(path, write) as draft, writing(path):
        os.replace(draft, path)
        _sync_folder(path.parent)


@contextmanager
def _drafted(path: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """A finished draft on the disk, which the block renames or the end removes."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{DRAFT}{path.name}-", dir=path.parent)
        os.close(handle)
    draft = Path(name)
    try:
        with writing(path):
            write(draft)
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(draft, 0o644)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder has reached the disk too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def draft_folder(folder: Path) -> Path:
    """A new empty folder beside `folder`, for `swap_folder`."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{DRAFT}{folder.name}-", dir=folder.parent))
        draft.chmod(0o755)
    return draft


def swap_folder(draft: Path, folder: Path) -> None:
    """Put `draft` in the place of `folder`; what was there stays whole until then, and is removed after."""
    with writing(folder):
        for path in draft.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        old = draft.with_name(f"{draft.name}-old")
        if folder.is_dir():
            os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except OSError:
            if old.is_dir():
                os.replace(old, folder)
            raise
        _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_swapped(folder: Path) -> None:
    """Put a folder back that a process which was killed in the middle of `swap_folder` had moved away."""
    if not folder.is_dir() and (moved := sorted(folder.parent.glob(f"{DRAFT}{folder.name}-*-old"))):
        with writing(folder):
            os.replace(moved[-1], folder)


def clear_drafts(folder: Path, *, of: str = "", deep: bool = True) -> int:
    """Remove what killed processes left half-written in a folder; only for whoever holds its lock.

    Args:
        folder: Where to look.
        of: Only drafts of files and folders whose name begins so.
        deep: Look below it too.

    Returns:
        How many there were.
    """
    pattern = f"{DRAFT}{of}*"
    found = list(folder.rglob(pattern) if deep else folder.glob(pattern))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as a whole file."""
    write_whole(path, lambda draft: _write(draft, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write JSON as a whole file; a value that is not finite is an error, not `NaN`."""
    write_bytes(path, _json_bytes(value))


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# -- records and seals ------------------------------------------------------------------------------------------------


def write_record(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object that carries the SHA-256 of itself."""
    write_bytes(path, _record_bytes(value))


def _record_bytes(value: Mapping[str, object]) -> bytes:
    return _json_bytes({**value, "sha256": digest(value)})


def read_record(path: Path) -> dict[str, object]:
    """Read what `write_record` wrote.

    Raises:
        DamagedError: It is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sha256 = value.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not readable ({type(error).__name__})") from error
    if sha256 != digest(value):
        raise DamagedError(f"{path} was changed after it was written")
    return value


def digest(value: object) -> str:
    """SHA-256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_sealed(path: Path, write: Callable[[Path], None], notes: Mapping[str, object]) -> None:
    """Write a whole file and its seal: without the seal the file counts as not written.

    Both are on the disk before the first is renamed: a full disk leaves the old file with its old seal.

    Args:
        path: The file.
        write: Fills a draft of it.
        notes: What it was made from, and what is known of it; JSON.
    """
    value = {"notes": json.loads(json.dumps(dict(notes), allow_nan=False))}
    with _drafted(path, write) as draft:
        facts = {"file_sha256": sha256_of(draft), "bytes": draft.stat().st_size, **value}
        data = _record_bytes(facts)
        with _drafted(seal_of(path), lambda seal: _write(seal, data)) as seal, writing(path):
            seal_of(path).unlink(missing_ok=True)
            os.replace(draft, path)
            os.replace(seal, seal_of(path))
            _sync_folder(path.parent)


def seal_of(path: Path) -> Path:
    """Where the seal of a file is."""
    return path.with_name(path.name + SEAL)


def is_sealed(path: Path) -> bool:
    """Whether a file was finished; whether it still is what it was, only `check_sealed` tells."""
    return seal_of(path).is_file()


def read_seal(path: Path) -> dict[str, object]:
    """The notes and the SHA-256 (`file_sha256`) of a sealed file, as its seal says; the file itself is not read.

    Raises:
        DamagedError: The seal is not readable.
    """
    return read_record(seal_of(path))


def check_sealed(path: Path) -> dict[str, object]:
    """The seal of a file, after comparing the file with it.

    Raises:
        DamagedError: File or seal is missing, truncated or edited.
    """
    seal = read_seal(path)
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    size = path.stat().st_size
    if size != seal["bytes"]:
        raise DamagedError(f"{path} has {size} bytes, expected {seal['bytes']}")
    if sha256_of(path) != seal["file_sha256"]:
        raise DamagedError(f"{path} was changed after it was written")
    return seal


def is_whole(path: Path, key: str, *, otherwise: str) -> bool:
    """Whether a file is finished, unchanged and made from `key`, the note of that name in its seal.

    One that is damaged or foreign is set aside, with a log line that names it: it will be made again.

    Args:
        path: A sealed file, or none yet.
        key: What it should be made from.
        otherwise: What a foreign one was made from, for the log line.
    """
    if not is_sealed(path):
        return False
    try:
        notes = check_sealed(path)["notes"]
        assert isinstance(notes, dict)
        if notes.get("key") != key:
            raise DamagedError(f"{path} was made from {otherwise}")
    except DamagedError as error:
        log.warning("%s; set aside as %s, it is made again", error, set_aside(path).name)
        return False
    return True


def remove_sealed(path: Path) -> None:
    """Remove a file and its seal, the seal first: in between the file counts as not written."""
    seal_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file or folder, and its seal if it has one, to a free name beside it; nothing is deleted."""
    number = 1
    # A file that was missing leaves only its seal under such a name.
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists() or seal_of(aside).exists():
        number += 1
    with writing(path):
        if path.exists():
            os.replace(path, aside)
        if seal_of(path).is_file():
            os.replace(seal_of(path), seal_of(aside))
    return aside


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted; none if it is not there."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_state(folder: Path) -> str:
    """Sixteen hex digits over names, sizes and modification times of all files below a folder.

    `datasets` keys its cache of a local folder with a card by the card alone: a rewritten table would come back as it was.
    Readers of local folders put this into the cache's path.
    """
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in files_below(folder):
        stat = path.stat()
        state.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return state.hexdigest()[:16]
