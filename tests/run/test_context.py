"""A run: its processes, folders, data, networks and times."""

import json
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from pipeline import one_line, run_in, tiny

from prism_hf.compare.methods import random_recipe
from prism_hf.errors import RecipeError
from prism_hf.recipe.plan import STAGES, TRACKERS
from prism_hf.run.context import Loaded, Run, make_accelerator

NAME = "squeeze:test_efficientnet"


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield make_accelerator()
    AcceleratorState._reset_state(True)


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


def test_times_of_an_interrupted_stage_are_kept(tmp_path, accelerator):
    run = Run(tiny(), tmp_path, tmp_path, accelerator)
    with pytest.raises(KeyboardInterrupt), run.timed("squeeze"):
        raise KeyboardInterrupt
    assert "squeeze" in run.times()


@pytest.mark.parametrize("name", ["nonsense", "all", "wandb", "trackio"])
def test_unknown_or_missing_trackers_give_a_one_line_error(tmp_path, name):
    if name in TRACKERS and __import__("importlib.util").util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(RecipeError) as error:
        make_accelerator(tmp_path / "out", log_with=name)
    assert name in one_line(error)
    assert not (tmp_path / "out").exists()


def test_precision_is_set_by_the_launch_and_never_float16(tmp_path, monkeypatch):
    for asked, precision in (("no", "float32"), ("bf16", "bf16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        AcceleratorState._reset_state(True)
        assert Run(tiny(), tmp_path, tmp_path, make_accelerator()).precision == precision
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RecipeError) as error:
        make_accelerator()
    assert "bf16" in one_line(error)
    AcceleratorState._reset_state(True)


# -- data and networks ------------------------------------------------------------------------------------------------


def test_data_and_teachers_are_loaded_once(finished_run):
    run = run_in(finished_run, finished_run / "teachers")
    assert run.data is run.data
    assert run.teachers([NAME])[NAME] is run.teachers([NAME, "squeeze:test_byobnet"])[NAME]
    assert list(run.teachers([NAME, "squeeze:test_byobnet", NAME])) == [NAME, "squeeze:test_byobnet"]
    assert run.artifacts is run.artifacts


def test_runs_share_what_is_loaded(finished_run, tmp_path):
    loaded = Loaded()
    first = run_in(tmp_path / "a", finished_run / "teachers", loaded=loaded)
    second = run_in(tmp_path / "b", finished_run / "teachers", "synthesis.lr=0.5", loaded=loaded)
    other = run_in(tmp_path / "c", finished_run / "teachers", "data.size=8", loaded=loaded)
    assert first.data is second.data
    assert first.teachers([NAME])[NAME] is second.teachers([NAME])[NAME]
    assert other.data is not first.data


def test_the_judge_is_the_verifier_or_else_the_logit_teacher(finished_run, tmp_path):
    run = run_in(tmp_path / "a", finished_run / "teachers")
    assert run.verifier is None
    assert run.judge.name == "squeeze:test_byobnet"
    with_verifier = run_in(tmp_path / "b", finished_run / "teachers", f"teachers.verifier={NAME}", "teachers.bn_pool=[]")
    assert with_verifier.verifier is with_verifier.judge
    assert with_verifier.judge.name == NAME


def test_a_run_of_random_images_has_no_control(tmp_path, accelerator):
    assert Run(tiny(), tmp_path, tmp_path, accelerator).wants_control
    assert not Run(tiny(), tmp_path, tmp_path, accelerator, with_control=False).wants_control
    assert not Run(random_recipe(tiny(), 2), tmp_path, tmp_path, accelerator).wants_control


def test_the_stages_are_named_in_order():
    assert STAGES == ("squeeze", "synthesize", "relabel", "package", "evaluate")


@pytest.mark.parametrize(
    ("flags", "precision", "lines"),
    [
        ("avx2 avx512_bf16", "bf16", 1), ("amx_bf16", "bf16", 0), ("fp bf16", "bf16", 0),
        ("avx2", "no", 0), (None, "bf16", 0),
    ],
)  # fmt: skip
def test_bf16_is_warned_of_once_where_it_is_slower(tmp_path, monkeypatch, caplog, flags, precision, lines):
    monkeypatch.setattr("prism_hf.run.context._CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    AcceleratorState._reset_state(True)
    with caplog.at_level("WARNING"):
        make_accelerator()
    AcceleratorState._reset_state(True)
    told = [record.message for record in caplog.records]
    assert [text.startswith("bf16 is slower than float32 on this CPU") for text in told] == [True] * lines
