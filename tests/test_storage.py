import json
import os
import stat

import pytest
import torch

from prism_hf.storage import read_notes, read_tensors, sha256_of, write_bytes, write_json, write_tensors, write_whole


def test_bytes_arrive_whole_in_new_folders_and_leave_no_draft(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def fail(draft):
        draft.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_json_keeps_unicode_and_refuses_what_is_not_finite(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": "鹤", "values": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "鹤", "values": [1, 2.5, None]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "鹤"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.int64])
def test_tensors_and_notes_come_back_equal(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "turned": torch.arange(6).reshape(2, 3).T.to(dtype)}
    notes = {"job": 3, "history": [{"step": 1, "ce": 0.25}], "verifier": None}
    write_tensors(path, tensors, notes)
    back, read = read_tensors(path)
    assert read == notes == read_notes(path)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == dtype
        assert torch.equal(back[key], value)


def test_equal_tensors_give_equal_bytes_and_notes_refuse_nan(tmp_path):
    for name in ("one", "two"):
        write_tensors(tmp_path / name, {"b": torch.ones(2), "a": torch.zeros(3)}, {"x": 1})
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_tensors(tmp_path / "three", {"a": torch.zeros(1)}, {"loss": float("nan")})
    assert not (tmp_path / "three").exists()


def test_sha256_of_known_bytes(tmp_path):
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
