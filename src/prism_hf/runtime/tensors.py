"""Tensors as artifacts: named tensors in safetensors files, long tables in .npy files written part by part."""

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
        # safetensors refuses tensors that share memory, as tied weights do.
        tied = any(value.data_ptr() == other.data_ptr() for other in plain.values())
        plain[key] = value.clone() if tied else value
    to.write(lambda draft: save_file(plain, draft), notes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors that `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_row(path: Path, key: str, row: int) -> Tensor:
    """Read one row of one tensor, without loading the others."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(key)[row : row + 1][0].clone()


def write_rows(to: Artifact, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
    """Write a table as a .npy file, in parts of shape (n, *shape[1:]): memory does not grow with the number of rows."""

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
    """Memory-map a table that `write_rows` wrote: the kernel loads pages on access, and may drop them again."""
    # Copy on write: torch does not accept a read-only array.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting: a copy from pageable memory waits for all work of a GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
