"""The output folder of a run: its owner, and leftovers of an earlier launch."""

import json
import subprocess

import pytest
from pipeline import PYTHON, mtimes, one_line, quiet_env, run_in, sha_tree, tiny

from prism_hf.errors import OutputError
from prism_hf.recipe.yaml_file import dump_recipe, load_recipe
from prism_hf.run.folder import check_folder, claimed, claimed_together, held_together, is_of_another
from prism_hf.runtime.lock import HOLDER, LOCK
from prism_hf.runtime.store import write_bytes


def claim(folder, recipe, **more):
    with claimed(folder, recipe, **more) as line:
        return line


def kept(folder):
    """Return the times of all files except the lock, which every process that takes it touches."""
    return {path: time for path, time in mtimes(folder).items() if not path.endswith(LOCK)}


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
def test_foreign_folders_are_refused_and_not_changed(tmp_path, kind):
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


# -- leftovers of an earlier launch -----------------------------------------------------------------------------------


def killed_in(folder):
    """Make a folder as left by a process that was killed while it swapped its dataset folder."""
    claim(folder, tiny())
    write_bytes(folder / ".draft-dataset-x-old" / "README.md", b"whole")
    write_bytes(folder / ".draft-dataset-x" / "README.md", b"half")
    write_bytes(folder / "work" / "jobs" / ".draft-job-00000", b"half")
    write_bytes(folder / "teachers" / ".draft-of-another-run", b"half")
    (folder / HOLDER).write_text(json.dumps({"host": "gone", "pid": 7, "since": "yesterday"}))


def test_leftovers_of_a_killed_launch_are_repaired_and_reported(tmp_path):
    killed_in(tmp_path / "run")
    line = claim(tmp_path / "run", tiny())
    assert line == "process 7 on gone, since yesterday, ended without cleaning up; resuming (2 drafts removed)"
    assert (tmp_path / "run" / "dataset" / "README.md").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "run").rglob(".draft-*")] == [".draft-of-another-run"], "it may be active"
    assert claim(tmp_path / "run", tiny()) is None


def test_a_folder_of_a_launch_killed_before_its_recipe_is_not_foreign(tmp_path):
    for name in (LOCK, HOLDER, ".draft-recipe.yaml-x"):
        write_bytes(tmp_path / "run" / name, b"{}")
    check_folder(tmp_path / "run", tiny())
    claim(tmp_path / "run", tiny())
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == tiny()


@pytest.mark.parametrize("text", [None, "synthesis: ["])
def test_a_fresh_run_moves_any_old_run_aside(tmp_path, text):
    folder = tmp_path / "run"
    claim(folder, tiny("seed=3"))
    write_bytes(folder / "work" / "job", b"x")
    if text is not None:
        (folder / "recipe.yaml").write_text(text)
    old = {name: sha for name, sha in sha_tree(folder).items() if name != LOCK}
    assert is_of_another(folder, tiny())
    line = claim(folder, tiny(), fresh=True)
    assert line == f"the old run was moved to {tmp_path / 'run.aside-1'}"
    assert sha_tree(tmp_path / "run.aside-1") == old
    assert not is_of_another(folder, tiny())
    assert not is_of_another(tmp_path / "nowhere", tiny())
    assert not (folder / "work").exists()


@pytest.mark.slow  # by default, runtime/test_lock.py holds the lock in a real process
def test_a_run_locks_its_folder_for_all_its_processes(tmp_path, finished_run):
    run = run_in(tmp_path / "run", finished_run / "teachers")
    other = tmp_path / "other.yaml"
    other.write_text(dump_recipe(run.recipe))
    code = """
import sys
from pathlib import Path
from prism_hf.recipe.yaml_file import load_recipe
from prism_hf.run.folder import claimed
with claimed(Path(sys.argv[1]), load_recipe(Path(sys.argv[2]))):
    pass
"""
    words = [PYTHON, "-c", code, str(run.folder), str(other)]
    for hold in (claimed_together, held_together):
        with hold(run):
            done = subprocess.run(words, capture_output=True, text=True, env=quiet_env(), check=False)
        assert "OutputError" in done.stderr
        assert str(run.folder) in done.stderr
    assert subprocess.run(words, capture_output=True, env=quiet_env(), check=False).returncode == 0


def test_a_folder_without_a_recipe_is_locked_and_cleared(tmp_path, finished_run):
    run = run_in(tmp_path / "run", finished_run / "teachers")
    write_bytes(run.folder / "work" / ".draft-x", b"half")
    with held_together(run):
        assert (run.folder / HOLDER).is_file()
        assert not list(run.folder.rglob(".draft-*"))
