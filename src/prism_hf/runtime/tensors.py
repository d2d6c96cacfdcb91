"""Tensors as artifacts: named ones in safetensors, long tables in .npy, written row by row."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .store import Artifact


def write_tensors(to: Artifact, tensors: Mapping[str, Tensor], notes: Mapping[str, object] | None = None) -> None:
    """Write tensors as a safetensors file; `notes` go into its seal."""
    plain: dict[str, Tensor] = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        # safetensors refuses two names for one memory, as tied weights have.
        tied = any(value.data_ptr() == other.data_ptr() for other in plain.values())
        plain[key] = value.clone() if tied else value
    to.write(lambda draft: save_file(plain, draft), notes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_row(path: Path, key: str, row: int) -> Tensor:
    """One row of one tensor, without the others."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(key)[row : row + 1][0].clone()


def write_rows(to: Artifact, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
    """Write a table as a .npy file, part by part, (n, *shape[1:]) each: memory does not grow with the number of rows."""

    def write(draft: Path) -> None:
        rows = 0
        with open(draft, "wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            for part in parts:
                assert part.shape[1:] == shape[1:], (part.shape, shape)
                file.write(np.ascontiguousarray(part, dtype=dtype).tobytes())
                rows += len(part)
        assert rows == shape[0], (rows, shape)

    to.write(write)


def open_rows(path: Path) -> Tensor:
    """A table that `write_rows` wrote, mapped into memory: the kernel reads what is touched, and may drop it again."""
    # Copy on write: torch takes no array that cannot be written.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
