"""Statistics of convolutions over the real data, kept on disk."""

import dataclasses
import json
import threading

import pytest
import torch
from real_images import image_split
from slow_statistics import gathered, same, small_teacher

from prism_hf.errors import DeviceMemoryError, StoppedError
from prism_hf.run import synthesize as keeping
from prism_hf.run.synthesize import real_statistics
from prism_hf.runtime import stop as interruption
from prism_hf.runtime.store import Artifact, is_finished, seal_of
from prism_hf.runtime.tensors import read_tensors, write_tensors


@pytest.fixture
def small(tiny_teachers):
    return small_teacher(tiny_teachers["test_resnet"])


@pytest.fixture(scope="module")
def split(tiny_images):
    return split_of(tiny_images)


def split_of(images):
    return image_split(images, [0] * len(images))


@pytest.fixture
def keep(small, split, tmp_path):
    """Request the statistics; return them and the number of passes over the data."""

    def ask(teacher=small, split=split, patch=8):
        passes = []
        handle = teacher.model.register_forward_pre_hook(lambda *_: passes.append(1))
        found = real_statistics(teacher, split, root=tmp_path, patch=patch)
        handle.remove()
        return found, len(passes)

    return ask


def files(folder):
    return sorted(folder.glob("statistics/*/conv.safetensors"))


def test_statistics_are_computed_once(keep, small, tiny_images, tmp_path):
    first, passes = keep()
    assert passes == 1
    again, passes = keep()
    assert passes == 0
    assert same(first, again)
    assert same(first, gathered(small, tiny_images))
    (path,) = files(tmp_path)
    assert is_finished(path)
    assert path.parent.name.startswith("test-resnet-")
    assert json.loads(seal_of(path).read_text())["notes"]["weights_sha256"] == small.weights_sha256


def test_a_change_of_any_input_makes_another_file(keep, small, tiny_images, tmp_path):
    keep()
    changes = [
        {"split": split_of(255 - tiny_images)},
        {"patch": 4},
        {"split": split_of(tiny_images[:6])},
        {"split": split_of(tiny_images[..., :24, :24])},
        {"split": split_of(tiny_images[:, :1])},
        {"teacher": dataclasses.replace(small, weights_sha256="0" * 64)},
        {"teacher": dataclasses.replace(small, size=24)},
        {"teacher": dataclasses.replace(small, mean=(0.1, 0.1, 0.1))},
        {"teacher": dataclasses.replace(small, std=(0.1, 0.1, 0.1))},
        {"teacher": dataclasses.replace(small, architecture="Other/Net")},
    ]
    for number, change in enumerate(changes, 2):
        assert keep(**change)[1] == 1, change
        assert len(files(tmp_path)) == number, change
    assert any(path.parent.name.startswith("other-net-") for path in files(tmp_path))
    assert keep(teacher=dataclasses.replace(small, name="another name"))[1] == 0


def spoil(path, how):
    if how == "bytes":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "gone":
        path.unlink()
    elif how == "seal":
        seal_of(path).write_text("{}")
    elif how == "foreign":
        write_tensors(Artifact(path, "of another"), read_tensors(path))


@pytest.mark.parametrize("how", ["bytes", "cut", "gone", "seal", "foreign"])
def test_a_damaged_or_foreign_file_is_set_aside_and_recreated(keep, tmp_path, caplog, how):
    first, _ = keep()
    (path,) = files(tmp_path)
    before = {key: value.clone() for key, value in first.items()}
    spoil(path, how)
    assert same(first, before)  # statistics in use do not change with the file
    caplog.clear()
    again, passes = keep()
    assert passes == 1
    assert same(first, again)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert str(path) in line
    assert "set aside as conv.safetensors.aside-1" in line
    assert keep()[1] == 0


def test_an_unfinished_file_counts_as_missing(keep, tmp_path):
    first, _ = keep()
    (path,) = files(tmp_path)
    seal_of(path).unlink()
    path.with_name(".draft-conv.safetensors-x").write_bytes(b"half")
    again, passes = keep()
    assert passes == 1
    assert same(first, again)
    assert not list(path.parent.glob(".draft-*"))


def test_concurrent_requests_compute_the_statistics_once(keep, monkeypatch, tmp_path):
    made, results, inside = [], [], threading.Event()

    def slow(*args, **kwargs):
        made.append(1)
        inside.set()
        threading.Event().wait(0.3)
        return {"0.channel_mean": torch.full((3,), float(len(made)))}

    monkeypatch.setattr(keeping, "gather_statistics", slow)
    threads = [threading.Thread(target=lambda: results.append(keep()[0])) for _ in range(3)]
    threads[0].start()
    inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(results) == 3
    assert all(same(result, results[0]) for result in results)
    assert same(keep()[0], results[0])


def test_gathering_stops_on_request_and_keeps_nothing(small, tiny_images, tmp_path):
    split, seen = split_of(tiny_images), []
    assert split.content, "read before"
    handle = small.model.register_forward_pre_hook(lambda *_: seen.append(interruption._wanted.set()))
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(keeping, "shuffled_batches", small_batches)
            with pytest.raises(StoppedError):
                real_statistics(small, split, root=tmp_path, patch=8)
    finally:
        handle.remove()
        interruption._wanted.clear()
    assert len(seen) == 1, "stopped before the second batch"
    assert files(tmp_path) == []


def small_batches(*args, **kwargs):
    from prism_hf.method.statistics import shuffled_batches

    return shuffled_batches(*args, **kwargs, batch_size=3)


def test_out_of_memory_gives_a_one_line_error(small, split, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    handle = small.model.register_forward_pre_hook(fail)
    with pytest.raises(DeviceMemoryError, match="teacher 'small': a batch of 7 real images for statistics.*out of memory"):
        real_statistics(small, split, root=tmp_path, patch=8)
    handle.remove()
    assert files(tmp_path) == []
