import types

import pytest
import torch
from pipeline import file_limit, one_line
from torch import nn

from prism_hf.errors import OutputError, StoppedError
from prism_hf.models.build import seeded
from prism_hf.models.training import (
    ShuffledBatches,
    fit,
    optimizer_state,
    part,
    prefixed,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from prism_hf.runtime import checkpoint as module
from prism_hf.runtime import stop as interruption
from prism_hf.runtime.checkpoint import Checkpoint, State
from prism_hf.runtime.store import Artifact, seal_of

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the end of the process."""


def checkpoint(path, key="key", every_s=module.EVERY_S):
    return Checkpoint(Artifact(path, key), every_s)


def state(number=1):
    return State({"a": torch.full((2,), float(number))}, {"step": number, "rate": 0.1})


@pytest.fixture
def asked_to_stop():
    interruption._wanted.set()
    yield
    interruption._wanted.clear()


# -- the file -------------------------------------------------------------------------------------------------------------


def test_a_state_is_restored_unchanged(tmp_path):
    kept = checkpoint(tmp_path / "c")
    assert kept.load() is None
    for number in (1, 2):
        kept.save(state(number))
        found = checkpoint(tmp_path / "c").load()
        assert found.notes == {"step": number, "rate": 0.1}
        assert torch.equal(found.tensors["a"], state(number).tensors["a"])
    kept.clear()
    assert kept.load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["another key", "truncated", "one bit", "removed", "seal garbage"])
def test_a_foreign_or_damaged_state_is_set_aside_with_a_log_line(tmp_path, caplog, kind):
    path = tmp_path / "c"
    checkpoint(path).save(state())
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "one bit":
        data[-1] ^= 1
        path.write_bytes(data)
    elif kind == "removed":
        path.unlink()
    elif kind == "seal garbage":
        seal_of(path).write_text("garbage")
    assert checkpoint(path, key="other" if kind == "another key" else "key").load() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    assert "set aside as c.aside-1, to be recreated" in line
    assert all(name.startswith("c.aside-1") for name in (p.name for p in tmp_path.iterdir()))
    assert checkpoint(path).load() is None


def test_a_state_without_its_seal_is_not_loaded(tmp_path):
    checkpoint(tmp_path / "c").save(state())
    seal_of(tmp_path / "c").unlink()
    assert checkpoint(tmp_path / "c").load() is None


@pytest.mark.parametrize("limit", [0, 50, 150, 200])
def test_a_full_disk_keeps_the_last_state(tmp_path, limit):
    kept = checkpoint(tmp_path / "c")
    kept.save(state(1))
    with file_limit(limit), pytest.raises(OutputError) as error:
        kept.save(state(2))
    assert "free some disk space" in one_line(error)
    assert kept.load().notes["step"] == 1


# -- when a state is written ----------------------------------------------------------------------------------------------


def test_every_0_writes_at_each_tick_and_the_default_does_not(tmp_path):
    for name, every, expected in (("a", 0, 3), ("b", module.EVERY_S, 0)):
        kept, asked = checkpoint(tmp_path / name, every_s=every), []
        for number in (1, 2, 3):
            kept.tick(lambda number=number, asked=asked: asked.append(number) or state(number))
        assert len(asked) == expected
    assert checkpoint(tmp_path / "a").load().notes["step"] == 3
    assert not (tmp_path / "b").exists()


def test_a_request_to_stop_saves_the_state_and_ends(tmp_path, asked_to_stop):
    with pytest.raises(StoppedError) as error:
        checkpoint(tmp_path / "c").tick(lambda: state(7))
    assert "run the same command again" in one_line(error)
    assert checkpoint(tmp_path / "c").load().notes["step"] == 7


@pytest.mark.parametrize(("seconds", "pause"), [(0.1, 120), (1.2, 120), (3, 300), (6, 600), (60, 600)])
def test_a_slow_disk_makes_checkpoints_up_to_five_times_less_frequent(tmp_path, monkeypatch, seconds, pause):
    now = [1000.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(dict):
        def items(self):
            now[0] += seconds
            return super().items()

    kept = checkpoint(tmp_path / "c", every_s=120)
    kept._last = now[0]
    kept.save(State(Slow(state().tensors), {"step": 0}))
    written = now[0]
    for after, expected in ((pause - 1, 0), (pause + 1, 1)):
        now[0] = written + after
        kept.tick(lambda: State(state().tensors, {"step": 1}))
        assert kept.load().notes["step"] == expected


# -- contents of a state --------------------------------------------------------------------------------------------------


def test_states_of_several_objects_share_a_file():
    both = prefixed("one", {"a": torch.zeros(1)}) | prefixed("two", {"a": torch.ones(1), "b/c": torch.ones(2)})
    assert set(part("one", both)) == {"a"}
    assert set(part("two", both)) == {"a", "b/c"}


def test_global_random_numbers_continue_from_the_saved_state():
    kept = random_state(CPU)
    first = torch.rand(3)
    restore_random_state(kept, CPU)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_resumes_with_its_moments_in_the_memory_layout_of_the_pixels(tmp_path, kind):
    def make():
        pixels = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        return pixels, kind([pixels], lr=0.1, betas=(0.5, 0.9))

    pixels, ours = make()
    gradients = torch.randn(5, 2, 3, 4, 4)
    for gradient in gradients[:3]:
        pixels.grad = gradient
        ours.step()
    kept = optimizer_state(ours)
    checkpoint(tmp_path / "c").save(State(kept.tensors | {"pixels": pixels}, {"optimizer": kept.notes}))
    found = checkpoint(tmp_path / "c").load()
    again, theirs = make()
    again.data.copy_(found.tensors.pop("pixels"))
    restore_optimizer(theirs, State(found.tensors, found.notes["optimizer"]))
    moment = theirs.state[again]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert theirs.param_groups[0]["betas"][0] == 0.5
    for gradient in gradients[3:]:
        for leaf, optimizer in ((pixels, ours), (again, theirs)):
            leaf.grad = gradient
            optimizer.step()
    assert torch.equal(pixels, again)


# -- fit ------------------------------------------------------------------------------------------------------------------

COUNT, PARTS, EPOCHS = 10, [range(0, 4), range(4, 8), range(8, 10)], 3


def trained(schedule, ema, kept=None, kill_at=None):
    """Train a small network with dropout on noisy batches, the last of them short; optionally killed in a step."""
    data = torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(COUNT) % 3
    calls = []

    def make(rows, generator):
        images = data[rows] + 0.1 * torch.randn((len(rows), 3, 8, 8), generator=generator)
        return images, labels[rows]

    def loss(logits, targets):
        calls.append(1)
        if len(calls) - 1 == kill_at:
            raise Killed
        return nn.functional.cross_entropy(logits, targets)

    with seeded(5, CPU):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(288, 3)
        )
        batches = ShuffledBatches(PARTS, EPOCHS, torch.Generator().manual_seed(2), make, count=COUNT)
        steps = EPOCHS * len(PARTS)
        result = fit(
            network,
            batches,
            loss,
            steps=steps,
            lr=0.01,
            weight_decay=0.1,
            schedule=schedule,
            ema=ema,
            checkpoint=kept,
        )
    return result.state_dict(), len(calls)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_training_killed_at_any_step_resumes_to_the_same_weights(tmp_path, schedule, ema):
    plain, steps = trained(schedule, ema)
    assert steps == EPOCHS * len(PARTS) == 9
    for step in range(steps):
        path = tmp_path / str(step)
        with pytest.raises(Killed):
            trained(schedule, ema, checkpoint(path, every_s=0), kill_at=step)
        again, calls = trained(schedule, ema, checkpoint(path, every_s=0))
        assert calls == steps - step, "finished steps are not recomputed"
        assert all(torch.equal(again[name], value) for name, value in plain.items())
        assert set(again) == set(plain)


def test_training_gives_the_same_weights_with_and_without_checkpoints(tmp_path):
    plain, _ = trained("cosine", 0.9)
    with_, _ = trained("cosine", 0.9, checkpoint(tmp_path / "c", every_s=0))
    assert all(torch.equal(with_[name], value) for name, value in plain.items())
