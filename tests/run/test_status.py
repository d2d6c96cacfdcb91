import json
import subprocess

import pytest
from pipeline import PYTHON, copy_run, launch, mtimes, one_line, quiet_env, tiny

from prism_hf.errors import OutputError
from prism_hf.recipe.yaml_file import dump_recipe
from prism_hf.run.status import status_text, survey
from prism_hf.runtime.store import Artifact, set_aside, write_json
from prism_hf.runtime.tensors import write_tensors

HOLD = """
import sys
from pathlib import Path
from prism_hf.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
PROGRESS = {
    "stage": "synthesize", "unit": "step", "done": 3, "of": 8, "now": "job 1", "seconds_left": 4000.0,
    "updated": 1.0, "host": "h", "pid": 1,
}  # fmt: skip


@pytest.fixture
def copied(finished_run, tmp_path):
    return copy_run(finished_run, tmp_path / "copy")


def shown(folder):
    """Return the state of a run, after checking that this changes nothing and that the last line has the same state."""
    before = mtimes(folder)
    state = survey(folder)
    *lines, last = status_text(state).split("\n")
    assert json.loads(last) == state
    assert mtimes(folder) == before
    return state, lines


def counts(state):
    return {name: (stage["done"], stage["of"]) for name, stage in state["stages"].items() if "of" in stage}


def test_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny()))
    state, lines = shown(tmp_path)
    assert counts(state) == {"synthesize": (0, 2), "relabel": (0, 2), "package": (0, 2), "evaluate": (0, 15)}
    assert (state["running"], state["failed"], state["checkpoints"], state["seconds_left"]) == (None, [], [], None)
    assert "not running" in lines[0]
    assert "squeeze     not yet run" in lines
    assert "synthesize  0 of 2 jobs done, 2 left" in lines


def test_a_run_with_its_dataset(finished_run):
    state, lines = shown(finished_run)
    assert counts(state) == {"synthesize": (2, 2), "relabel": (2, 2), "package": (2, 2), "evaluate": (0, 15)}
    assert state["fingerprint"] == tiny().fingerprint()
    files = {path.stat().st_ino: path.stat().st_size for path in finished_run.rglob("*") if path.is_file()}
    assert state["bytes"] == sum(files.values()), "a table with two names counts once"
    assert "relabel     2 of 2 view shards done  " in " ".join(lines)
    assert any(line.startswith("evaluate    0 of 15 students done, 15 left") for line in lines)


def test_a_run_that_was_killed(copied):
    (copied / "work/jobs/job-00001.safetensors.seal").unlink()
    write_tensors(Artifact(copied / "work/jobs/job-00001.checkpoint.safetensors", "k"), {})
    (copied / "work/distilled/views/train-00000-of-00001.parquet.seal").unlink()
    Artifact(copied / "work/students/distilled-soft-seed0.json", "k").write_json({"top1": 0.5})
    (copied / "work/students/distilled-soft-seed1.json").write_text("{}")  # its seal does not exist yet
    write_json(copied / "work/progress-0.json", PROGRESS)
    write_json(copied / ".holder.json", {"host": "h", "pid": 1, "since": "then"})
    state, lines = shown(copied)
    assert counts(state) == {"synthesize": (1, 2), "relabel": (1, 2), "package": (2, 2), "evaluate": (1, 15)}
    assert (state["running"], state["processes"], state["seconds_left"]) == (None, [], None)
    assert state["checkpoints"] == ["job-00001.checkpoint.safetensors"]
    assert "not running" in lines[0]
    assert "unfinished  1 with a checkpoint: job-00001.checkpoint.safetensors" in lines


def test_a_run_in_progress(copied):
    write_json(copied / "work/progress-0.json", PROGRESS)
    write_json(copied / "work/progress-1.json", PROGRESS | {"seconds_left": None})
    (copied / "work/progress-2.json").write_text("{")
    other = subprocess.Popen(
        [PYTHON, "-c", HOLD, str(copied)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet_env()
    )
    try:
        assert other.stdout.readline() == "held\n"
        state, lines = shown(copied)
    finally:
        other.communicate("\n")
    assert state["running"]["pid"] == other.pid
    assert f"running: process {other.pid} on " in lines[0]
    assert state["seconds_left"] == 4000
    assert "this stage  about 67 min left" in lines
    (line, _) = [line for line in lines if line.startswith("process ")]
    assert "synthesize: job 1, 3 of 8 steps, no update for " in line


def test_failed_jobs_and_damaged_files(copied):
    path = copied / "work/jobs/job-00001.failed.safetensors"
    write_tensors(Artifact(path, "k"), {}, {"job": 1, "reason": "job 1, iteration 2: not finite"})
    (copied / "work/jobs/job-00001.safetensors.seal").unlink()
    set_aside(copied / "work/distilled/pixels.npy")
    state, lines = shown(copied)
    assert state["failed"] == [{"job": 1, "reason": "job 1, iteration 2: not finite"}]
    assert state["aside"] == ["work/distilled/pixels.npy.aside-1"]
    assert "failed      job 1, iteration 2: not finite" in lines
    assert "set aside   work/distilled/pixels.npy.aside-1" in lines


def test_an_unreadable_seal_does_not_prevent_the_status(copied):
    path = copied / "work/jobs/job-00001.failed.safetensors"
    write_tensors(Artifact(path, "k"), {}, {"job": 1, "reason": "bad"})
    path.with_name(path.name + ".seal").write_text("garbage")
    (copied / "work/jobs/job-00001.safetensors.seal").unlink()
    state, _ = shown(copied)
    assert counts(state)["synthesize"] == (1, 2)
    assert state["failed"][0]["job"] == 1
    assert "not readable" in state["failed"][0]["reason"]


@pytest.mark.parametrize("kind", ["missing", "empty", "other files", "broken recipe"])
def test_a_folder_without_a_run_gives_a_one_line_error(tmp_path, kind):
    folder = tmp_path / "run"
    if kind != "missing":
        folder.mkdir()
    if kind == "other files":
        (folder / "thesis.txt").write_text("precious")
    elif kind == "broken recipe":
        (folder / "recipe.yaml").write_text("synthesis: [")
    before = mtimes(tmp_path)
    with pytest.raises(OutputError) as error:
        survey(folder)
    assert str(folder) in one_line(error)
    assert mtimes(tmp_path) == before


def test_the_command_prints_the_status(finished_run, tmp_path, capsys):
    before = mtimes(finished_run)
    assert launch(finished_run, name="status", recipe=None) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == survey(finished_run)
    assert launch("--status", finished_run, recipe=None) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == survey(finished_run)
    assert launch("--output", finished_run, "--status") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]["synthesize"]["done"] == 2
    assert launch("--status", tmp_path / "nowhere", recipe=None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("OutputError: ")
    assert mtimes(finished_run) == before


def test_teachers_are_done_when_all_are_trained(copied):
    assert "squeeze     done" in shown(copied)[1][1]
    (copied / "work" / "squeezed.json").unlink()
    assert "squeeze     started" in shown(copied)[1][1]
