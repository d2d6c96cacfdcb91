import json
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from pipeline import mtimes, one_line, tiny

from prism_hf.errors import OutputError, RecipeError
from prism_hf.recipe.plan import STAGES, TRACKERS
from prism_hf.recipe.yaml_file import load_recipe
from prism_hf.run.context import Run, claimed, log_pictures, make_accelerator, start_trackers
from prism_hf.runtime.lock import LOCK


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield make_accelerator()
    AcceleratorState._reset_state(True)


def claim(folder, recipe, **more):
    with claimed(folder, recipe, **more) as left:
        return left


def kept(folder):
    """Times of all files but the lock, which is touched by whoever takes it."""
    return {path: time for path, time in mtimes(folder).items() if not path.endswith(LOCK)}


# -- the output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", ["missing", "empty", "deep"])
def test_a_new_folder_is_claimed_with_the_resolved_recipe(tmp_path, prepare):
    folder = tmp_path / "a" / "b" if prepare == "deep" else tmp_path / "out"
    if prepare == "empty":
        folder.mkdir()
    with claimed(folder, tiny()):
        assert load_recipe(folder / "recipe.yaml") == tiny()
    assert {p.name for p in folder.iterdir()} == {"recipe.yaml", LOCK}


def test_the_same_recipe_finds_its_folder_again(tmp_path):
    claim(tmp_path / "out", tiny())
    before = kept(tmp_path)
    claim(tmp_path / "out", tiny())
    claim(tmp_path / "out", tiny("name=renamed"))
    assert kept(tmp_path) == before


def test_another_recipe_is_refused_and_the_keys_are_named(tmp_path):
    claim(tmp_path / "out", tiny())
    before = mtimes(tmp_path)
    with pytest.raises(OutputError) as error:
        claim(tmp_path / "out", tiny("synthesis.lr=0.5", "seed=3", "relabel.view.mix=mixup", "name=renamed"))
    text = one_line(error)
    assert all(word in text for word in ("synthesis.lr", "seed", "relabel.view.mix", "--output"))
    assert "synthesis.ipc" not in text
    assert "name" not in text.split("differ:")[1]
    assert mtimes(tmp_path) == before


@pytest.mark.parametrize("kind", ["other files", "a file", "below a file", "broken recipe"])
def test_foreign_places_are_refused_and_left_alone(tmp_path, kind):
    folder = tmp_path / "out"
    if kind == "other files":
        folder.mkdir()
        (folder / "thesis.txt").write_text("precious")
    elif kind == "broken recipe":
        folder.mkdir()
        (folder / "recipe.yaml").write_text("synthesis: [")
    else:
        folder.write_text("precious")
    before = mtimes(tmp_path)
    with pytest.raises(OutputError) as error:
        claim(folder / "x" if kind == "below a file" else folder, tiny())
    assert str(folder) in one_line(error)
    assert mtimes(tmp_path) == before


# -- processes and times ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (7, 3), (2, 4), (0, 2)])
def test_processes_share_everything_once(tmp_path, accelerator, monkeypatch, count, world):
    shares = []
    for rank in range(world):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        monkeypatch.setattr(type(accelerator), "num_processes", world)
        shares.append(Run(tiny(), tmp_path, tmp_path, accelerator).mine(range(count)))
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_times_add_up_over_launches_in_the_order_of_stages(tmp_path, accelerator):
    for stage in ("relabel", "squeeze", "relabel"):
        with Run(tiny(), tmp_path, tmp_path, accelerator).timed(stage):
            time.sleep(0.02)
    run = Run(tiny(), tmp_path, tmp_path, accelerator)
    times = run.times()
    assert list(times) == ["squeeze", "relabel"]
    assert times == json.loads((tmp_path / "work" / "times.json").read_text())
    assert all(seconds > 0 for seconds in times.values())


def test_folders_and_hardware(tmp_path, accelerator):
    run = Run(tiny(), tmp_path, tmp_path / "teachers", accelerator)
    assert (run.dataset, run.control, run.work) == tuple(tmp_path / name for name in ("dataset", "control", "work"))
    assert run.hardware == {"device": accelerator.device.type, "threads": torch.get_num_threads(), "precision": "float32"}


def test_threads_are_set_when_asked(tmp_path):
    AcceleratorState._reset_state(True)
    before = torch.get_num_threads()
    make_accelerator(threads=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    AcceleratorState._reset_state(True)


# -- trackers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "all", "wandb", "trackio"])
def test_unknown_or_missing_trackers_are_one_line(tmp_path, name):
    if name in TRACKERS and __import__("importlib.util").util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(RecipeError) as error:
        make_accelerator(tmp_path / "out", log_with=name)
    assert name in one_line(error)
    assert not (tmp_path / "out").exists()


def test_tensorboard_takes_the_recipe_scalars_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(tmp_path, log_with="tensorboard")
    run = Run(tiny(), tmp_path, tmp_path, accelerator)
    start_trackers(run)
    accelerator.log({"job0/ce": 0.5}, step=1)
    for channels in (1, 3):
        log_pictures(accelerator, f"picture{channels}", torch.zeros(channels, 5, 4, dtype=torch.uint8), step=1)
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
    start_trackers(Run(tiny(), tmp_path / "out", tmp_path, accelerator))
    log_pictures(accelerator, "x", torch.zeros(1, 2, 2, dtype=torch.uint8), step=0)
    accelerator.end_training()
    assert not (tmp_path / "out").exists()
    AcceleratorState._reset_state(True)


def test_the_stages_are_named_in_order():
    assert STAGES == ("squeeze", "synthesize", "relabel", "package", "evaluate")
