"""Whole files: written completely or not at all, with a proof of what they were made from; read back, or set aside."""

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
"""Names of unfinished files and folders begin so; a process that was killed leaves them, the next launch clears them."""
SEAL = ".seal"
_FULL = ("No space left", "File too large", "quota exceeded")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into an `OutputError`: one line that helps."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "make it writable, or use another folder"
        if any(words in reason for words in _FULL):
            remedy = "what is finished stays good: make space and give the same command again"
        raise OutputError(f"{path} cannot be written ({reason}); {remedy}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: a reader sees the old file or the new one."""
    with _drafted(path, write) as draft, writing(path):
        os.replace(draft, path)
        _sync(path.parent)


@contextmanager
def _drafted(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A finished draft on the disk, which the block renames or the end removes."""
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
    """Wait until a file is on the disk, or a folder: only then does a rename in it survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
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
    """Put a folder back that a process which was killed in the middle of `swap_folder` had moved away."""
    if not folder.is_dir() and (moved := sorted(folder.parent.glob(f"{DRAFT}{folder.name}-*-old"))):
        with writing(folder):
            os.replace(moved[-1], folder)


def clear_drafts(folder: Path, *, of: str = "", deep: bool = True) -> int:
    """Remove what killed processes left half-written in a folder, and count it; only for whoever holds its lock.

    `of` takes only drafts of files and folders whose name begins so, `deep` those below the folder too.
    """
    drafts = list(folder.glob(f"{'**/' if deep else ''}{DRAFT}{of}*"))
    for path in drafts:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(drafts)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file."""
    write_whole(path, lambda draft: draft.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Write JSON as a whole file; a value that is not finite is an error, not `NaN`."""
    write_bytes(path, _json_bytes(value))


def read_json(path: Path) -> Any:
    """The JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Proof:
    """What the seal of a file says: what it was made from, hash and size, and what else is known of it, as plain JSON."""

    key: str
    sha256: str
    bytes: int
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A file that a stage leaves for another one, and a key: the digest of everything that the file is made from.

    A second file beside it, its seal, holds the proof. Without one it counts as not written.
    """

    path: Path
    key: str

    def write(self, fill: Callable[[Path], object], notes: Mapping[str, object] | None = None) -> None:
        """Let `fill` write a draft of the file, then put file and seal in place; a full disk leaves both as they were."""
        with _drafted(self.path, fill) as draft:
            noted = json.loads(json.dumps({**(notes or {}), "key": self.key}, allow_nan=False))
            facts = {"file_sha256": sha256_of(draft), "bytes": draft.stat().st_size, "notes": noted}
            data = _json_bytes(facts | {"sha256": digest(facts)})
            # Both are on the disk before the first is renamed.
            with _drafted(seal_of(self.path), lambda seal: seal.write_bytes(data)) as seal, writing(self.path):
                seal_of(self.path).unlink(missing_ok=True)
                os.replace(draft, self.path)
                os.replace(seal, seal_of(self.path))
                _sync(self.path.parent)

    def write_bytes(self, data: bytes) -> None:
        """Write the file."""
        self.write(lambda draft: draft.write_bytes(data))

    def write_json(self, value: object) -> None:
        """Write the file as JSON."""
        self.write_bytes(_json_bytes(value))

    def check(self) -> Proof:
        """The proof, or a `DamagedError`: file or seal is missing, truncated or edited, or made from something else.

        An untouched file is not read again.
        """
        proof = read_proof(self.path)
        if not self.path.is_file():
            raise DamagedError(f"{self.path} is missing")
        stat = self.path.stat()
        if stat.st_size != proof.bytes:
            raise DamagedError(f"{self.path} has {stat.st_size} bytes, expected {proof.bytes}")
        if _sha256_as_of(self.path, stat.st_mtime_ns, stat.st_size) != proof.sha256:
            raise DamagedError(f"{self.path} was changed after it was written")
        if proof.key != self.key:
            raise DamagedError(f"{self.path} was made from another recipe, or from other data, teachers or settings")
        return proof

    def is_whole(self) -> bool:
        """Whether the file is finished, unchanged and made from the key; a damaged or foreign one is set aside."""
        return is_finished(self.path) and sound_or_aside(self.path, self.check) is not None

    def read_json(self) -> Any:
        """The JSON value that `write_json` wrote; see `check`."""
        self.check()
        return read_json(self.path)

    def remove(self) -> None:
        """Remove the file and its seal, the seal first: in between the file counts as not written."""
        seal_of(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def seal_of(path: Path) -> Path:
    """Where the seal of a file is."""
    return path.with_name(path.name + SEAL)


def is_finished(path: Path) -> bool:
    """Whether a file has a seal; whether it still is what it was, only `Artifact.check` tells."""
    return seal_of(path).is_file()


def read_proof(path: Path) -> Proof:
    """What the seal of a file says, or a `DamagedError`; the file itself is not read."""
    seal = seal_of(path)
    try:
        facts = read_json(seal)
        sha256, notes = facts.pop("sha256"), dict(facts["notes"])
        proof = Proof(notes.pop("key"), facts["file_sha256"], facts["bytes"], notes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{seal} is not readable ({type(error).__name__})") from error
    if sha256 != digest(facts):
        raise DamagedError(f"{seal} was changed after it was written")
    return proof


def sound_or_aside(path: Path, check: Callable[[], T]) -> T | None:
    """What `check` returns of a file or folder; on a `DamagedError` it is set aside with a log line, and that is `None`."""
    try:
        return check()
    except DamagedError as error:
        log.warning("%s; set aside as %s, it is made again", error, set_aside(path).name)
        return None


def digest(value: object) -> str:
    """SHA-256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@lru_cache(maxsize=2**16)
def _sha256_as_of(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_of(path)


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
    """All files below a folder, sorted; none if it does not exist."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_state(folder: Path) -> str:
    """Sixteen hex digits over names, sizes and modification times of all files below a folder: a part of a cache's path.

    `datasets` keys its cache of a local folder with a card by the card alone: a rewritten table would come back as it was.
    """
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in files_below(folder):
        stat = path.stat()
        state.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return state.hexdigest()[:16]
