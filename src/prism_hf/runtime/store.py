"""Atomic files: written completely or not at all, with a proof of their inputs; checked on reading, or set aside."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..errors import DamagedError, OutputError

log = logging.getLogger(__name__)
T = TypeVar("T")
DRAFT = ".draft-"
"""Prefix of unfinished files and folders. A killed process leaves them behind, and the next launch removes them."""
SEAL = ".seal"
_FULL = ("No space left", "File too large", "quota exceeded")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system error during a write into an `OutputError` that says in one line what to do."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "make it writable, or use another folder"
        if any(phrase in reason for phrase in _FULL):
            remedy = "finished work is kept: free some disk space and run the same command again"
        raise OutputError(f"{path} cannot be written ({reason}); {remedy}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a draft beside `path`, then rename it to `path`: a reader sees the old file or the new one."""
    with _drafted(path, write) as draft, writing(path):
        os.replace(draft, path)
        _sync(path.parent)


@contextmanager
def _drafted(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a finished draft on the disk. If the block does not rename it, it is removed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{DRAFT}{path.name}-", dir=path.parent)
        os.close(handle)
    draft = Path(name)
    try:
        with writing(path):
            write(draft)
            _sync(draft)
            os.chmod(draft, 0o644)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk: a rename in a folder survives a power failure only after that."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def draft_folder(folder: Path) -> Path:
    """Create an empty folder beside `folder`, for `swap_folder`."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{DRAFT}{folder.name}-", dir=folder.parent))
        draft.chmod(0o755)
    return draft


def swap_folder(draft: Path, folder: Path) -> None:
    """Replace `folder` with `draft`. The old folder stays complete until then, and is removed afterwards."""
    with writing(folder):
        for path in files_below(draft):
            _sync(path)
        old = draft.with_name(f"{draft.name}-old")
        if folder.is_dir():
            os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except OSError:
            restore_swapped(folder)
            raise
        _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_swapped(folder: Path) -> None:
    """Restore a folder that was moved away by a process that was killed during `swap_folder`."""
    if not folder.is_dir() and (moved := sorted(folder.parent.glob(f"{DRAFT}{folder.name}-*-old"))):
        with writing(folder):
            os.replace(moved[-1], folder)


def clear_drafts(folder: Path, *, of: str = "", deep: bool = True) -> int:
    """Remove the drafts that killed processes left in a folder, and return their number. Hold the folder's lock to call it.

    `of` limits this to drafts of files and folders whose names begin with it. `deep` includes all subfolders.
    """
    drafts = list(folder.glob(f"{'**/' if deep else ''}{DRAFT}{of}*"))
    for path in drafts:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(drafts)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as a file, atomically."""
    write_whole(path, lambda draft: draft.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Write JSON as a file, atomically. A non-finite number is an error, not `NaN`."""
    write_bytes(path, _json_bytes(value))


def read_json(path: Path) -> Any:
    """Return the JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Proof:
    """The content of a file's seal: the key (a digest of its inputs), hash and size, and further notes as plain JSON."""

    key: str
    sha256: str
    bytes: int
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A file that one stage leaves for another, and its key: a digest of everything that the file is made from.

    A second file beside it, the seal, holds the proof. A file without a seal counts as not written.
    """

    path: Path
    key: str

    def write(self, fill: Callable[[Path], object], notes: Mapping[str, object] | None = None) -> None:
        """Let `fill` write a draft of the file, then move file and seal into place. A full disk leaves both unchanged."""
        with _drafted(self.path, fill) as draft:
            noted = json.loads(json.dumps({**(notes or {}), "key": self.key}, allow_nan=False))
            facts = {"file_sha256": sha256_of(draft), "bytes": draft.stat().st_size, "notes": noted}
            data = _json_bytes(facts | {"sha256": digest(facts)})
            # Both drafts are on the disk before the first is renamed.
            with _drafted(seal_of(self.path), lambda seal: seal.write_bytes(data)) as seal, writing(self.path):
                seal_of(self.path).unlink(missing_ok=True)
                os.replace(draft, self.path)
                os.replace(seal, seal_of(self.path))
                _sync(self.path.parent)

    def write_bytes(self, data: bytes) -> None:
        """Write the file from bytes."""
        self.write(lambda draft: draft.write_bytes(data))

    def write_json(self, value: object) -> None:
        """Write the file as JSON."""
        self.write_bytes(_json_bytes(value))

    def check(self) -> Proof:
        """Return the proof. A file or seal that is missing, truncated, edited or has another key raises a `DamagedError`.

        A file with an unchanged size and modification time is not read again.
        """
        proof = read_proof(self.path)
        name = str(self.path)  # not a `Path`, because hashing and joining thousands of paths takes seconds
        if not os.path.isfile(name):
            raise DamagedError(f"{name} is missing")
        stat = os.stat(name)
        if stat.st_size != proof.bytes:
            raise DamagedError(f"{self.path} has {stat.st_size} bytes, expected {proof.bytes}")
        if _sha256_as_of(name, stat.st_mtime_ns, stat.st_size) != proof.sha256:
            raise DamagedError(f"{self.path} was changed after it was written")
        if proof.key != self.key:
            raise DamagedError(f"{self.path} was made from another recipe, or from other data, teachers or settings")
        return proof

    def is_whole(self) -> bool:
        """Return whether the file is finished, unchanged and has this key. A damaged or foreign one is set aside."""
        return is_finished(self.path) and sound_or_aside(self.path, self.check) is not None

    def read_json(self) -> Any:
        """Return the JSON value that `write_json` wrote; see `check`."""
        self.check()
        return read_json(self.path)

    def remove(self) -> None:
        """Remove the seal and then the file: in between, the file counts as not written."""
        seal_of(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def seal_of(path: Path) -> Path:
    """Return the path of a file's seal."""
    return Path(f"{path}{SEAL}")


def is_finished(path: Path) -> bool:
    """Return whether a file has a seal. Only `Artifact.check` verifies that the file is unchanged."""
    return os.path.isfile(f"{path}{SEAL}")


def read_proof(path: Path) -> Proof:
    """Return the content of a file's seal, or raise a `DamagedError`. The file itself is not read."""
    seal = f"{path}{SEAL}"
    try:
        stat = os.stat(seal)
        return _proof_as_of(seal, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DamagedError(f"{seal} is not readable ({type(error).__name__})") from error


# Several stages read the seal of every job.
@lru_cache(maxsize=2**16)
def _proof_as_of(seal: str, inode: int, mtime_ns: int, size: int) -> Proof:
    try:
        facts = read_json(Path(seal))
        sha256, notes = facts.pop("sha256"), dict(facts["notes"])
        proof = Proof(notes.pop("key"), facts["file_sha256"], facts["bytes"], notes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{seal} is not readable ({type(error).__name__})") from error
    if sha256 != digest(facts):
        raise DamagedError(f"{seal} was changed after it was written")
    return proof


def sound_or_aside(path: Path, check: Callable[[], T]) -> T | None:
    """Return the result of `check`. On a `DamagedError`, set the file or folder aside, log it, and return `None`."""
    try:
        return check()
    except DamagedError as error:
        log.warning("%s; set aside as %s, to be recreated", error, set_aside(path).name)
        return None


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value; equal values have the same digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@lru_cache(maxsize=2**16)
def _sha256_as_of(path: str, mtime_ns: int, size: int) -> str:
    return sha256_of(Path(path))


def set_aside(path: Path) -> Path:
    """Rename a file or folder, and its seal if it has one, to a free name beside it. Nothing is deleted."""
    number = 1
    # If the file was missing when it was set aside, only its seal has such a name.
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists() or seal_of(aside).exists():
        number += 1
    with writing(path):
        if path.exists():
            os.replace(path, aside)
        if seal_of(path).is_file():
            os.replace(seal_of(path), seal_of(aside))
    return aside


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted; an empty list if it does not exist."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_state(folder: Path) -> str:
    """Return 16 hex digits over the names, sizes and modification times of all files below a folder, for a cache path.

    `datasets` keys its cache of a local folder with a card by the card alone, so it would miss a rewritten table.
    """
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in files_below(folder):
        stat = path.stat()
        state.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return state.hexdigest()[:16]
