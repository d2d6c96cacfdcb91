"""How files reach the disk: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        write(Path(draft))
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as a whole file."""
    write_whole(path, lambda draft: _write(draft, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write JSON as a whole file; a value that is not finite is an error, not `NaN`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, object]) -> None:
    """Write a safetensors file whose metadata carry `notes` as JSON."""
    plain = {key: value.contiguous() for key, value in tensors.items()}
    write_bytes(path, tensors_to_bytes(plain, metadata={"notes": json.dumps(notes, allow_nan=False)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, read_notes(path)  # noqa: SIM118


def read_notes(path: Path) -> dict[str, object]:
    """Only the notes of a file that `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("notes", "{}"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_state(folder: Path) -> str:
    """Sixteen hex digits over names, sizes and modification times of all files below a folder.

    `datasets` keys its cache of a local folder with a card by the card alone: a rewritten table would come back as it was.
    Readers of local folders put this into the cache's path.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state = path.stat()
        digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
