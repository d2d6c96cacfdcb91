import numpy as np
import pytest
import torch
from pipeline import file_limit, one_line

from prism_hf.errors import OutputError
from prism_hf.runtime.store import Artifact, is_finished, read_proof, sha256_of
from prism_hf.runtime.tensors import open_rows, read_row, read_tensors, write_rows, write_tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.int64])
def test_tensors_and_notes_are_read_back_equal(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "turned": torch.arange(6).reshape(2, 3).T.to(dtype)}
    notes = {"job": 3, "history": [{"step": 1, "ce": 0.25}], "verifier": None}
    write_tensors(Artifact(path, "k"), tensors, notes)
    back = read_tensors(path)
    assert Artifact(path, "k").check().notes == notes == read_proof(path).notes
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == dtype
        assert torch.equal(back[key], value)


def test_equal_tensors_give_equal_bytes_and_notes_refuse_nan(tmp_path):
    for name in ("one", "two"):
        write_tensors(Artifact(tmp_path / name, "k"), {"b": torch.ones(2), "a": torch.zeros(3)}, {"x": 1})
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_tensors(Artifact(tmp_path / "three", "k"), {"a": torch.zeros(1)}, {"loss": float("nan")})
    assert not (tmp_path / "three").exists()


def test_one_tensor_may_have_two_names_and_must_not_be_empty(tmp_path):
    shared, empty = torch.arange(4.0), torch.empty(0, 3)
    tensors = {"a": shared, "b": shared, "c": shared.view(2, 2), "d": empty, "e": empty, "f": torch.tensor(3)}
    write_tensors(Artifact(tmp_path / "t", "k"), tensors)
    back = read_tensors(tmp_path / "t")
    assert all(torch.equal(back[key], value) for key, value in tensors.items())


def test_tensors_that_require_a_gradient_can_be_stored(tmp_path):
    value = torch.ones(2, 3, 4, 4, requires_grad=True).to(memory_format=torch.channels_last)
    write_tensors(Artifact(tmp_path / "t", "k"), {"a": value})
    assert torch.equal(read_tensors(tmp_path / "t")["a"], value)


def test_a_single_row_can_be_read(tmp_path):
    images = torch.arange(24, dtype=torch.uint8).reshape(4, 1, 2, 3)
    write_tensors(Artifact(tmp_path / "t", "k"), {"images": images, "other": torch.zeros(1)})
    for row in range(4):
        assert torch.equal(read_row(tmp_path / "t", "images", row), images[row])


@pytest.mark.parametrize("cuts", [[7], [3, 4], [1] * 7, [0, 7, 0]])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16"])
def test_rows_are_read_back_however_they_were_split(tmp_path, cuts, dtype):
    whole = np.arange(42).reshape(7, 2, 3).astype(dtype)
    parts = np.split(whole, np.cumsum(cuts)[:-1])
    path = tmp_path / "rows.npy"
    write_rows(Artifact(path, "k"), iter(parts), whole.shape, dtype)
    assert np.array_equal(np.load(path), whole)
    rows = open_rows(path)
    assert np.array_equal(rows.numpy(), whole)
    assert rows.numpy().dtype == whole.dtype
    assert Artifact(path, "k").is_whole()


def test_changes_in_memory_do_not_reach_the_file(tmp_path):
    table = Artifact(tmp_path / "rows.npy", "k")
    write_rows(table, [np.zeros((3, 2), np.uint8)], (3, 2), "uint8")
    rows = open_rows(table.path)
    rows += 1
    del rows
    table.check()
    assert int(open_rows(table.path).sum()) == 0


@pytest.mark.parametrize("parts", [[np.zeros((2, 2))], [np.zeros((3, 2)), np.zeros((1, 2))], [np.zeros((3, 1))]])
def test_rows_of_another_number_or_shape_are_an_internal_error(tmp_path, parts):
    with pytest.raises(AssertionError):
        write_rows(Artifact(tmp_path / "rows.npy", "k"), parts, (3, 2), "float64")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 10, 300, 4000])
@pytest.mark.parametrize("kind", ["tensors", "rows"])
def test_a_full_disk_gives_a_one_line_error_and_keeps_the_old_file(tmp_path, kind, limit):
    path = tmp_path / "file"

    def write(value, key):
        if kind == "tensors":
            write_tensors(Artifact(path, key), {"a": torch.full((1000,), value)})
        else:
            write_rows(Artifact(path, key), [np.full((500, 2), value)], (500, 2), "float64")

    write(1.0, "one")
    before = sha256_of(path)
    with file_limit(limit), pytest.raises(OutputError) as error:
        write(2.0, "two")
    assert str(path) in one_line(error)
    assert "free some disk space" in one_line(error)
    assert Artifact(path, "one").check().sha256 == sha256_of(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "file.seal"]
    assert is_finished(path)
