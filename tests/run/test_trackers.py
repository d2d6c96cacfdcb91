"""Data sent to trackers."""

import pytest
import torch
from accelerate.state import AcceleratorState
from pipeline import tiny

from prism_hf.run.context import log_picture, make_accelerator
from prism_hf.run.distill import start_trackers


def test_tensorboard_receives_the_recipe_scalars_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(tmp_path, log_with="tensorboard")
    start_trackers(accelerator, tiny())
    accelerator.log({"job0/ce": 0.5}, step=1)
    for channels in (1, 3):
        log_picture(accelerator, f"picture{channels}", torch.zeros(channels, 5, 4, dtype=torch.uint8), step=1)
    accelerator.end_training()
    (file,) = (p for p in (tmp_path / "logs").rglob("events*") if p.parent.name == "prism-hf")
    events = EventAccumulator(str(file))
    events.Reload()
    assert "job0/ce" in events.Tags()["scalars"]
    assert set(events.Tags()["images"]) == {"picture1", "picture3"}
    (picture,) = events.Images("picture1")
    assert (picture.height, picture.width) == (5, 4)
    AcceleratorState._reset_state(True)


def test_without_a_tracker_nothing_is_written(tmp_path):
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(tmp_path / "out")
    start_trackers(accelerator, tiny())
    log_picture(accelerator, "x", torch.zeros(1, 2, 2, dtype=torch.uint8), step=0)
    accelerator.end_training()
    assert not (tmp_path / "out").exists()
    AcceleratorState._reset_state(True)
