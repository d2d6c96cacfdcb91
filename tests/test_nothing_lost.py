"""Runs that are killed, run out of disk, or change their number of processes end with the same bytes.

benchmarks/kills.py does this fifty times at random moments; this is the short version.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import PYTHON, ROOT, TINY, launch, quiet_env, sha_tree

from prism_hf.recipe.plan import STAGES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def harness():
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


kills = harness()
SHORT = "prism, in short"
kills.RECIPES[SHORT] = (
    "prism_ipc10.yaml",
    (
        "synthesis.iterations=20", "synthesis.ipc=2", "squeeze.epochs=1", "relabel.epochs=4",
        "evaluation.full_data_epochs=0", "evaluation.seeds=[0]",
    ),
)  # fmt: skip
CASES = {
    SHORT: [("synthesize", "SIGKILL", "one worker", 2), ("relabel", "SIGTERM", "workers", 1)],
    "prism, per slot": [("synthesize", "SIGKILL", "one worker", 2), ("relabel", "SIGTERM", "workers", 1)],
    "prism, per iteration, from noise": [("squeeze", "SIGINT", "everybody", 1), ("evaluate", "SIGKILL", "launcher", 2)],
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return a function that gives the folder, hashes and stage times of an undisturbed run, made once per recipe."""
    made = {}

    def get(recipe):
        if recipe not in made:
            folder = tmp_path_factory.mktemp("references") / "run"
            made[recipe] = (folder, *kills.reference(recipe, folder))
        return made[recipe]

    return get


@pytest.mark.slow  # by default, run/test_synthesize.py kills one process inside a job
@pytest.mark.parametrize("recipe", CASES)
def test_a_killed_run_ends_with_the_same_bytes_as_an_undisturbed_one(recipe, references, tmp_path):
    struck = [kills.Kill(stage, 0.5, name, whom, count) for stage, name, whom, count in CASES[recipe]]
    case = kills.Case(0, recipe, struck, last_processes=1 if recipe == SHORT else 3)
    _, expected, times = references(recipe)
    kills.run_case(case, tmp_path / "killed", expected, times)
    assert case.problems == []
    assert None not in [kill.hit for kill in case.kills], "a launch ended before it was killed"


@pytest.mark.slow
def test_the_harness_detects_a_changed_byte_and_repeated_work(references, tmp_path, monkeypatch):
    """Make the check fail: without kills, but with a damaged job and a wrong expected hash."""
    recipe = SHORT
    source, expected, times = references(recipe)
    folder = Path(shutil.copytree(source, tmp_path / "run"))
    case = kills.Case(0, recipe, [], last_processes=1)
    job = folder / "work" / "jobs" / "job-00001.safetensors"
    before, looks = kills.finished_files, []

    def damaged_after_the_first_look(place):
        looks.append(before(place))
        if len(looks) == 1:
            job.write_bytes(b"")
        return looks[-1]

    monkeypatch.setattr(kills, "finished_files", damaged_after_the_first_look)
    kills.run_case(case, folder, expected | {"dataset/README.md": "0" * 64}, times)
    text = " ".join(case.problems)
    assert "not the same bytes: ['dataset/README.md']" in text
    assert "made twice: ['work/jobs/job-00001.safetensors']" in text
    assert "left behind: ['job-00001.safetensors.aside-1" in text


# -- a full disk ------------------------------------------------------------------------------------------------------


STARVED = """
import json, resource, sys
sys.path[:0] = {paths!r}
from test_nothing_lost import go, kills, Path
from prism_hf.recipe.plan import STAGES

folder, packaged = map(Path, sys.argv[1:])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def starved(place, *words):
    # The system refuses further writes, as with a full disk or a quota; Python ignores the signal that it sends.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, hard))
    kept = kills.finished_files(place) if place.is_dir() else {{}}
    code = go(place, *words)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    same = kills.finished_files(place).items() >= kept.items()
    return [words[-1], code, same, len(list(place.rglob(".draft-*")))]


found = []
for stage in STAGES:
    found += [starved(folder, "--stage", stage), ["then", go(folder, "--stage", stage), True, 0]]
found.append(starved(packaged, "--stage", "package"))
print(json.dumps(found))
"""


def go(folder, *words):
    return launch(
        *TINY, "evaluation.full_data_epochs=0", "evaluation.seeds=[0]", *words, "--output", folder, "--threads", "1"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert go(folder) == 0
    return folder


@pytest.mark.slow
def test_a_full_disk_in_any_stage_loses_no_finished_work(undisturbed, tmp_path):
    """Use a separate process, because pytest captures output in files, which the limit would also truncate."""
    folder, packaged = tmp_path / "run", Path(shutil.copytree(undisturbed, tmp_path / "packaged"))
    for record in (packaged / "work").glob("*/provenance.json*"):
        record.unlink()
    code = STARVED.format(paths=[str(ROOT / "tests"), str(ROOT / "src")])
    done = subprocess.run(
        [PYTHON, "-c", code, str(folder), str(packaged)],
        capture_output=True, text=True, env=quiet_env(), check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == [
        *(line for stage in STAGES for line in ([stage, 2, True, 0], ["then", 0, True, 0])),
        ["package", 2, True, 0],
    ]
    errors = [line for line in done.stderr.splitlines() if line.split(":")[0].endswith("Error")]
    assert len(errors) == len(STAGES) + 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for part in kills.PARTS:
        assert sha_tree(folder / part) == sha_tree(undisturbed / part), part
    assert sha_tree(packaged / "dataset") == sha_tree(undisturbed / "dataset")
    assert sorted(p.name for p in packaged.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def test_drafts_of_a_killed_process_are_removed_and_logged(undisturbed, tmp_path):
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
    assert "process 7 on gone, since yesterday, ended without cleaning up; resuming (2 drafts removed)" in (
        folder / "logs" / "run.log"
    ).read_text(encoding="utf-8")
