import argparse
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from pipeline import PYTHON, RECIPE, ROOT, TINY, launch, mtimes, quiet_env, save_timm, sha_tree, tiny

import prism_hf
from prism_hf.cli.main import main, parse
from prism_hf.cli.options import run_command, split_overrides
from prism_hf.errors import DataError, RecipeError, SynthesisError
from prism_hf.recipe.yaml_file import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def go(folder, *words):
    return launch(*TINY, "--output", folder, "--threads", "1", *words)


# -- run_command ------------------------------------------------------------------------------------------------------


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize("kind", [RecipeError, DataError, SynthesisError])
def test_a_prism_error_is_one_line_and_exit_code_two(capsys, kind):
    assert run_command(raising(kind("what to do")), argparse.Namespace(debug=False)) == 2
    assert capsys.readouterr().err == f"{kind.__name__}: what to do\n"


def test_debug_keeps_the_traceback(capsys):
    with pytest.raises(RecipeError):
        run_command(raising(RecipeError("x")), argparse.Namespace(debug=True))


def test_internal_errors_keep_their_traceback():
    with pytest.raises(AssertionError):
        run_command(raising(AssertionError("broken invariant")), argparse.Namespace(debug=False))


def test_an_interrupt_says_how_to_resume(capsys):
    assert run_command(raising(KeyboardInterrupt()), argparse.Namespace(debug=False)) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_paths_and_overrides_are_distinguished():
    words = ["a.yaml", "x.y=1", "b=c=d", "c.yaml"]
    assert split_overrides(words) == (["a.yaml", "c.yaml"], ["x.y=1", "b=c=d"])


@pytest.mark.parametrize(
    "words",
    [["R.yaml", "a=1", "--threads", "2"], ["--threads", "2", "R.yaml", "a=1"], ["R.yaml", "--threads", "2", "a=1"]],
)
@pytest.mark.parametrize("name", ["distill", "squeeze", "evaluate", "compare"])
def test_options_may_appear_anywhere(name, words):
    args = parse([name, *words])
    assert (args.words, args.threads) == (["R.yaml", "a=1"], 2)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_creates_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch("--dry-run", *TINY, "data.source=nobody/knows", "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("fingerprint", "nobody/knows", "20 (2 per class)", "squeeze:test_efficientnet", "2 of up to 10 images"):
        assert word in out, word
    assert list(tmp_path.iterdir()) == []


def typed(folder, *words):
    """Run a command in a separate process."""
    return subprocess.run(
        [PYTHON, *map(str, words)], cwd=folder, capture_output=True, text=True, env=quiet_env(), check=False
    )


def test_the_script_defaults_to_the_embedded_recipe(tmp_path):
    done = typed(tmp_path, ROOT / "recipes" / "prism.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "digits-prism-ipc10" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_the_same_command_line_but_no_default_recipe(tmp_path):
    done = typed(tmp_path, "-m", "prism_hf", "distill", RECIPE, "--dry-run")
    assert done.stdout == typed(tmp_path, ROOT / "recipes" / "prism.py", "--dry-run").stdout
    done = typed(tmp_path, "-m", "prism_hf", "distill", "--dry-run")
    assert done.returncode == 2
    assert done.stderr == "RecipeError: expected one recipe, got none; write overrides as key=value\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prism", "squeeze", "evaluate", "compare"])
def test_each_script_shows_its_usage(name, tmp_path):
    done = typed(tmp_path, ROOT / "recipes" / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: accelerate launch recipes/{name}.py [-h]")
    assert f"\n    accelerate launch recipes/{name}.py " in done.stdout, "an example"


def test_help_lists_each_command_on_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.split("  COMMAND\n")[1].splitlines()
    assert [
        line.split()[0] for line in lines
    ] == "distill recipes squeeze evaluate compare status push verify export".split()
    assert all(line.endswith(".") and len(line) <= 80 for line in lines), lines
    for name in (line.split()[0] for line in lines):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert f"\n    prism-hf {name} " in capsys.readouterr().out, "an example"


def test_the_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"prism-hf {prism_hf.__version__}\n"


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "unknown key": (["synthesis.iteration=3"], ["synthesis.iteration", "iterations"]),
    "wrong type": (["synthesis.ipc=many"], ["synthesis.ipc", "many"]),
    "two recipes": (["other.yaml"], ["one recipe"]),
    "tracker": (["--log-with", "nonsense"], ["nonsense", "tensorboard"]),
    "squeezed teacher": (["teachers.logit=squeeze:nonsense"], ["nonsense"]),
    "hub teacher": (["teachers.logit=resnet18.tv_in1k"], ["resnet18.tv_in1k"]),
    "local teacher": (["teachers.logit=local-dir:/no/such"], ["/no/such"]),
    "student": (["evaluation.student=nonsense"], ["nonsense"]),
    "transformers student": (["evaluation.student=transformers:nonsense"], ["nonsense"]),
    "no source": (["data.source=/no/such/folder"], ["/no/such/folder"]),
    "no source, noise": (["data.source=/no/such/folder", "synthesis.init=noise"], ["/no/such/folder"]),
    "no source, tracker": (["data.source=/no/such/folder", "--log-with", "tensorboard"], ["/no/such/folder"]),
    "class count": (["data.num_classes=11"], ["11", "10 classes"]),
    "class count, noise": (["data.num_classes=11", "synthesis.init=noise"], ["11", "10 classes"]),
    "ipc": (["synthesis.ipc=140"], ["140"]),
    "squeeze batch": (["squeeze.batch_size=2000"], ["1347"]),
    "BN teacher": (["teachers.bn_pool=[squeeze:test_nfnet]"], ["test_nfnet", "BatchNorm"]),
    "optimizer": (["evaluation.optimizer=muonn"], ["evaluation.optimizer", "muonn", "muon"]),
    "closure": (["evaluation.optimizer=adahessian"], ["evaluation.optimizer", "adahessian"]),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_input_gives_a_one_line_error_and_writes_nothing(tmp_path, capsys, monkeypatch, kind):
    words, expected = BAD[kind]
    monkeypatch.chdir(tmp_path)
    assert go(tmp_path / "out", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert all(word in line for word in expected), line
    assert mtimes(tmp_path) == {}, "the corrected command would find a folder with another recipe"


@pytest.mark.parametrize("name", ["distill", "squeeze"])
def test_a_missing_recipe_gives_a_one_line_error(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert launch(name=name, recipe="nowhere.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere.yaml" in line
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_with_other_classes_gives_a_one_line_error_and_writes_nothing(tmp_path, capsys):
    folder = save_timm(tmp_path / "teacher", classes=7)
    assert go(tmp_path / "out", f"teachers.logit=local-dir:{folder}", f"relabel.teachers=['local-dir:{folder}']") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "7 classes" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe_or_program_gives_a_one_line_error(tmp_path, capsys):
    assert go(tmp_path / "out", "--stage", "squeeze") == 0
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    before = mtimes(tmp_path)
    capsys.readouterr()
    assert go(tmp_path / "out", "synthesis.lr=0.5", "--stage", "squeeze") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "synthesis.lr" in line
    assert go(tmp_path / "foreign") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "foreign" in line
    assert mtimes(tmp_path) == before


def test_a_real_launch_prints_only_one_line_to_stderr(tmp_path):
    words = [str(RECIPE), *TINY, "data.source=/no/such/folder", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [PYTHON, str(ROOT / "recipes" / "prism.py"), *words], capture_output=True, text=True, env=quiet_env(), check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("DataError: ")


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has not been evaluated."""
    folder = tmp_path_factory.mktemp("made") / "out"
    for stage in ("squeeze", "synthesize", "relabel", "package"):
        assert go(folder, "evaluation.full_data_epochs=0", "evaluation.seeds=[0]", "--stage", stage) == 0
    return folder


def evaluate(*words):
    return launch(*words, "--threads", "1", name="evaluate", recipe=None)


def test_evaluate_scores_a_folder_without_changing_it(made, tmp_path, capsys):
    before = mtimes(made)
    assert evaluate(made / "dataset", "--teachers", made / "teachers", "--seeds", "2", "--output", tmp_path / "e") == 0
    assert mtimes(made) == before
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "e" / "report.json").read_text())["evaluation"]
    assert [(row["images"], row["labels"], row["seeds"]) for row in report["rows"]] == [
        (images, labels, [0, 1]) for labels in ("soft", "hard") for images in ("distilled", "random_real")
    ]
    assert "random real" in out
    assert str(tmp_path / "e" / "report.json") in out
    assert sha_tree(next((tmp_path / "e").glob("*/control/data"))) == sha_tree(made / "control" / "data")


def test_evaluate_without_teachers_omits_the_control_and_says_why(made, tmp_path, capsys):
    words = [made / "dataset", "--teachers", tmp_path / "none", "--student", "test_resnet", "--output", tmp_path / "e"]
    assert evaluate(*words) == 0
    report = json.loads((tmp_path / "e" / "report.json").read_text())["evaluation"]
    assert [row["images"] for row in report["rows"]] == ["distilled", "distilled"]
    assert report["student"] == "test_resnet"
    assert "not trained yet" in report["left_out"]["random real"]
    assert "left out: random real" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["DATA", "synthesis.lr=1"], ["synthesis.lr", "evaluation.*"]),
        (["DATA", "--seeds", "0"], ["--seeds"]),
        (["DATA", "--student", "nonsense"], ["nonsense"]),
        (["DATA", "--test", "/no/such/folder"], ["/no/such/folder"]),
        (["DATA", "evaluation.epochs=9"], ["evaluation.epochs"]),
        (["/no/such/folder"], ["/no/such/folder"]),
        (["nobody-there/no-such-set"], ["nobody-there/no-such-set"]),
        (["DATA", "OTHER"], ["one dataset"]),
    ],
    ids=lambda value: value[-1].strip("/") if isinstance(value, list) else None,
)
def test_evaluate_with_bad_input_gives_a_one_line_error(made, tmp_path, capsys, words, expected):
    words = [str(made / "dataset") if word == "DATA" else word for word in words]
    assert evaluate(*words, "--output", tmp_path / "e", "--teachers", made / "teachers") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in expected), line
    assert mtimes(tmp_path) == {}


# -- the other command, and trackers ----------------------------------------------------------------------------------


def test_squeeze_trains_the_teachers_and_prism_finds_them(tmp_path, capsys):
    teachers = tmp_path / "teachers"
    assert launch(*TINY, "--output", teachers, "--threads", "1", name="squeeze") == 0
    lines = capsys.readouterr().out.splitlines()
    folders = {line.split()[0]: line.split()[1] for line in lines}
    assert set(folders) == {"squeeze:test_byobnet", "squeeze:test_efficientnet"}
    assert sorted(folders.values()) == sorted(str(path) for path in teachers.iterdir())
    before = mtimes(teachers)
    assert go(tmp_path / "out", "--teachers", teachers, "--stage", "squeeze") == 0
    assert launch(*TINY, "--output", teachers, "--threads", "1", name="squeeze") == 0
    assert mtimes(teachers) == before
    assert not (tmp_path / "out" / "teachers").exists()


def test_squeeze_without_a_squeezed_teacher_gives_a_one_line_error(tmp_path, capsys):
    words = ["teachers.logit=resnet18.tv_in1k", "teachers.bn_pool=[]", "relabel.teachers=[resnet18.tv_in1k]"]
    assert launch(*TINY, *words, "--output", tmp_path / "t", name="squeeze") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "t").exists()


def test_tensorboard_receives_losses_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["teachers.verifier=squeeze:test_resnet", "synthesis.verify_every=2", "--log-with", "tensorboard"]
    for stage in ("squeeze", "synthesize"):
        assert go(tmp_path / "out", *words, "--stage", stage) == 0
    scalars, pictures = set(), set()
    for file in (tmp_path / "out" / "logs").rglob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        scalars |= set(events.Tags()["scalars"])
        pictures |= set(events.Tags()["images"])
    assert {f"synthesis/{term}" for term in ("ce", "bn", "lr", "verifier_top1")} <= scalars
    assert "synthesis/images" in pictures


def test_a_changed_dataset_gets_its_own_control_and_scores(made, tmp_path):
    folder = Path(shutil.copytree(made / "dataset", tmp_path / "copy"))
    words = ["--teachers", made / "teachers", "--seeds", "1", "--output", tmp_path / "e"]
    assert evaluate(folder, *words) == 0
    path = next((folder / "data").glob("*.parquet"))
    table = pq.read_table(path)
    labels = table["label"].to_numpy()[::-1].copy()
    pq.write_table(table.set_column(1, table.schema.field("label"), [labels]), path)
    assert evaluate(folder, *words) == 0
    assert len([p for p in (tmp_path / "e").iterdir() if p.is_dir() and p.name != "work"]) == 2


def test_paths_with_an_equals_sign_are_paths(tmp_path):
    odd = tmp_path / "lr=0.1"
    odd.mkdir()
    assert split_overrides([str(odd), "a.b=1"]) == ([str(odd)], ["a.b=1"])


def test_the_control_is_omitted_unless_the_same_teachers_can_label_it(made, tmp_path):
    folder = Path(shutil.copytree(made / "dataset", tmp_path / "copy"))
    provenance = json.loads((folder / "provenance.json").read_text())
    for teacher in provenance["teachers"]:
        teacher["weights_sha256"] = "0" * 64
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert evaluate(folder, "--teachers", made / "teachers", "--seeds", "1", "--output", tmp_path / "e") == 0
    report = json.loads((tmp_path / "e" / "report.json").read_text())["evaluation"]
    assert {row["images"] for row in report["rows"]} == {"distilled"}
    assert "other weights" in report["left_out"]["random real"]


# -- a folder that is in use, moved aside, too small ----------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from prism_hf.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
CHEAP = ("evaluation.full_data_epochs=0", "evaluation.seeds=[0]")


@pytest.mark.slow  # by default, runtime/test_lock.py holds the lock in a real process
def test_a_second_launch_in_the_same_folder_is_refused(made, tmp_path, capsys):
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    other = subprocess.Popen(
        [PYTHON, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet_env()
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = {p: t for p, t in mtimes(folder).items() if not p.endswith(".lock")}
        for more in ([], ["--fresh"], ["--fresh", "synthesis.lr=0.5"]):
            assert go(folder, *CHEAP, *more, "--stage", "synthesize") == 2, more
            assert {p: t for p, t in mtimes(folder).items() if not p.endswith(".lock")} == before, more
    finally:
        other.communicate("\n")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("OutputError: ")
        assert f"in use by process {other.pid} on " in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("change", [[], ["synthesis.lr=0.5"]], ids=["same recipe", "another recipe"])
def test_fresh_moves_the_old_run_aside_unchanged(made, tmp_path, capsys, change):
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    (folder / ".lock").unlink(missing_ok=True)
    before = sha_tree(folder)
    words = [*CHEAP, *change, "--teachers", made / "teachers", "--stage", "synthesize", "--fresh"]
    assert go(folder, *words) == 0
    assert sha_tree(tmp_path / "run.aside-1") == before
    assert not (folder / "dataset").exists()
    assert len(list((folder / "work" / "jobs").glob("*.safetensors"))) == 2
    assert f"moved to {tmp_path / 'run.aside-1'}" in (folder / "logs" / "run.log").read_text()
    if change:
        assert go(folder, *CHEAP, "--stage", "synthesize") == 2
        assert "--fresh" in capsys.readouterr().err
    assert go(folder, *words) == 0
    assert sha_tree(tmp_path / "run.aside-1") == before
    assert (tmp_path / "run.aside-2" / "work").is_dir()


def test_fresh_in_an_empty_or_new_folder_has_no_effect(made, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert go(tmp_path / name, *CHEAP, "--teachers", made / "teachers", "--stage", "squeeze", "--fresh") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_fresh_moves_only_runs(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    before = mtimes(tmp_path)
    assert go(tmp_path / "mine", "--fresh") == 2
    assert "does not contain a run" in capsys.readouterr().err
    assert mtimes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("folder", ["new", "old"])
def test_too_little_space_is_reported_before_anything_is_written(made, tmp_path, capsys, folder):
    if folder == "old":
        shutil.copytree(made, tmp_path / "old")
    before = mtimes(tmp_path)
    words = ["--fresh"] if folder == "old" else []
    assert go(tmp_path / folder, "relabel.epochs=2000000000", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("OutputError: ")
    assert "TB" in line
    assert mtimes(tmp_path) == before


@pytest.mark.parametrize("text", ["-1", "soon", "nan", "100000"])
def test_seconds_between_checkpoints_are_validated(capsys, text):
    with pytest.raises(SystemExit) as end:
        parse(["distill", "--checkpoint-every", text])
    assert end.value.code == 2
    assert "0 to 86400" in capsys.readouterr().err


def test_seconds_between_checkpoints_reach_the_jobs(made, tmp_path):
    for seconds in ("0", "7.5"):
        words = ["--teachers", made / "teachers", "--stage", "synthesize", "--checkpoint-every", seconds]
        assert go(tmp_path / seconds, *CHEAP, *words) == 0
        assert f"a checkpoint every {seconds} s" in (tmp_path / seconds / "logs" / "run.log").read_text()


# -- the same from Python ---------------------------------------------------------------------------------------------


def test_python_does_what_the_command_does(made, tmp_path):
    words = (*TINY, *CHEAP)
    folder = Path(shutil.copytree(made, tmp_path / "command"))
    assert go(folder, *CHEAP) == 0
    AcceleratorState._reset_state(True)
    result = prism_hf.distill(RECIPE, tmp_path / "python", words, teachers=made / "teachers", threads=1)
    assert (result.folder, result.dataset, result.url) == (tmp_path / "python", tmp_path / "python" / "dataset", None)
    assert result.report["evaluation"] == json.loads((folder / "report.json").read_text())["evaluation"]
    assert sha_tree(result.dataset / "data") == sha_tree(folder / "dataset" / "data")
    before = mtimes(result.dataset / "data")
    AcceleratorState._reset_state(True)
    again = prism_hf.distill(tiny(*CHEAP), str(result.folder), teachers=str(made / "teachers"), threads=1)
    assert again.report["evaluation"] == result.report["evaluation"]
    assert mtimes(again.dataset / "data") == before


def test_python_runs_one_stage_and_returns_no_dataset_or_report_yet(made, tmp_path):
    AcceleratorState._reset_state(True)
    result = prism_hf.distill(
        tiny(), tmp_path / "run", ["synthesis.lr=0.5"], teachers=made / "teachers", stage="synthesize", threads=1
    )
    assert (result.dataset, result.report) == (None, None)
    assert [path.name for path in (tmp_path / "run" / "work" / "jobs").glob("*.safetensors")]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").synthesis.lr == 0.5


def test_python_refuses_a_stage_that_does_not_exist(tmp_path):
    with pytest.raises(RecipeError, match="stage 'distill' is unknown; use one of squeeze, synthesize, "):
        prism_hf.distill(tiny(), tmp_path / "run", stage="distill")
    assert not (tmp_path / "run").exists()
