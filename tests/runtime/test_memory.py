import pytest
import torch
from pipeline import one_line

from prism_hf.errors import DeviceMemoryError
from prism_hf.runtime.memory import told_in_one_line


def from_torch():
    torch.empty(2**50)


def from_python():
    raise MemoryError


def from_a_device():
    raise torch.OutOfMemoryError("Tried to allocate 2 GiB,\nand there is no room")


@pytest.mark.parametrize("fail", [from_torch, from_python, from_a_device])
def test_too_little_memory_gives_a_one_line_error_with_batch_and_advice(fail):
    with pytest.raises(DeviceMemoryError) as error, told_in_one_line("job 3: a batch of 100 images", "Lower it"):
        fail()
    assert one_line(error) == "job 3: a batch of 100 images: out of memory. Lower it"


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyboardInterrupt])
def test_other_errors_are_unchanged(kind):
    with pytest.raises(kind, match="shapes do not match"), told_in_one_line("a batch", "Lower it"):
        raise kind("shapes do not match")
