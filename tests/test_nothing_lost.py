"""Whole runs that are killed, run out of disk, or change their number of processes: the bytes at the end are the same.

benchmarks/kills.py does it fifty times at random moments; this is the short version.
"""

import importlib.util
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from pipeline import ROOT, TINY, launch, one_line, sha_tree

from prism_hf.plan import STAGES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def harness():
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kills = harness()
CASES = {
    "prism, per slot": [("synthesize", "SIGKILL", "one worker", 2), ("relabel", "SIGTERM", "workers", 1)],
    "prism, per iteration, from noise": [("squeeze", "SIGINT", "everybody", 1), ("evaluate", "SIGKILL", "launcher", 2)],
}


@pytest.mark.parametrize("recipe", CASES)
def test_a_run_that_is_killed_ends_with_the_bytes_of_one_that_is_not(recipe, tmp_path):
    struck = [kills.Kill(stage, 0.5, name, whom, count) for stage, name, whom, count in CASES[recipe]]
    case = kills.Case(0, recipe, struck, last_processes=3)
    expected, times = kills.reference(recipe, tmp_path / "reference")
    kills.run_case(case, tmp_path / "killed", expected, times)
    assert case.problems == []
    assert [kill.hit for kill in case.kills] == [kill.stage for kill in case.kills]


def test_the_harness_sees_a_changed_byte_and_work_done_twice(tmp_path, monkeypatch):
    """A check that cannot fail is a defect: without kills, with a damaged job and a wrong expectation."""
    recipe = "prism, per slot"
    expected, times = kills.reference(recipe, tmp_path / "run")
    case = kills.Case(0, recipe, [], last_processes=1)
    job = tmp_path / "run" / "work" / "jobs" / "job-00001.safetensors"
    before = kills.finished_files

    def finished_then_damaged(folder):
        found = before(folder)
        if not case.problems and job.stat().st_size:
            job.write_bytes(b"")
        return found

    monkeypatch.setattr(kills, "finished_files", finished_then_damaged)
    kills.run_case(case, tmp_path / "run", expected | {"dataset/README.md": "0" * 64}, times)
    text = " ".join(case.problems)
    assert "not the same bytes: ['dataset/README.md']" in text
    assert "made twice: ['work/jobs/job-00001.safetensors']" in text
    assert "left behind: ['job-00001.safetensors.aside-1" in text


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_above(size):
    """As a full disk or a quota does, the system refuses to write more; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def go(folder, *words):
    return launch(
        *TINY, "evaluation.full_data_epochs=0", "evaluation.seeds=[0]", *words, "--output", folder, "--threads", "1"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert go(folder) == 0
    return folder


def test_a_disk_that_is_full_in_every_stage_costs_nothing_that_is_finished(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    for stage in STAGES:
        kept = kills.finished_files(folder) if folder.is_dir() else {}
        capsys.readouterr()
        with no_file_above(1200):
            assert go(folder, "--stage", stage) == 2, stage
        assert "cannot be" in one_line(capsys.readouterr().err.strip().splitlines()[-1]), stage
        assert kills.finished_files(folder).items() >= kept.items(), stage
        assert not list(folder.rglob(".draft-*")), stage
        assert go(folder, "--stage", stage) == 0
    for part in kills.PARTS:
        assert sha_tree(folder / part) == sha_tree(undisturbed / part), part


def test_a_full_disk_while_packaging_leaves_the_old_data_set(undisturbed, tmp_path, capsys):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = sha_tree(folder / "dataset")
    for record in (folder / "work").glob("*/packaged.json"):
        record.unlink()
    with no_file_above(1200):
        assert go(folder, "--stage", "package") == 2
    assert "File too large" in capsys.readouterr().err
    assert sha_tree(folder / "dataset") == before
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def test_what_a_killed_process_left_half_written_is_removed_and_named_in_the_log(undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    drafts = [
        folder / "work" / "jobs" / ".draft-job-00000.safetensors-x",
        folder / ".draft-dataset-y" / "data" / "t.parquet",
    ]
    for draft in drafts:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(b"half")
    (folder / ".holder.json").write_text(json.dumps({"host": "gone", "pid": 7, "since": "yesterday"}))
    assert go(folder) == 0
    assert not list(folder.rglob(".draft-*"))
    assert "process 7 on gone, since yesterday, ended without a word; going on (2 drafts removed)" in (
        folder / "logs" / "run.log"
    ).read_text(encoding="utf-8")
