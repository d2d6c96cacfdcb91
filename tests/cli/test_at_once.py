"""Errors of a recipe, a source or a folder come before any heavy library is loaded, so within a second."""

import json
import subprocess
import sys
from pathlib import Path

from pipeline import quiet_env

ROOT = Path(__file__).resolve().parents[2]
GOOD = "digits/prism_ipc10"
HEAVY = {"torch", "transformers", "datasets", "timm", "accelerate", "huggingface_hub", "sklearn", "matplotlib", "pandas"}
WRONG = [
    (["distill", "nowhere.yaml"], "nowhere.yaml"),
    (["nowhere.yaml"], "nowhere.yaml"),
    (["distill", GOOD, "synthesis.ipc=x"], "synthesis.ipc"),
    (["distill", GOOD, "synthesis.ipc=1"], "synthesis.batch_size=10"),
    (["distill", GOOD, "data.source=photos"], "'photos' is neither a folder here nor a Hub id"),
    (["distill", GOOD, "data.source=./photos"], "give `digits`, a Hub id or the path of a folder"),
    (["distill", GOOD, "--output", "a_file"], "'a_file' is a file"),
    (["distill", GOOD, "--teachers", "a_file"], "choose a folder with --teachers"),
    (["distill", GOOD, "--output", "full"], "is not empty and does not contain a run"),
    (["distill", GOOD, "--output", "other"], "these keys differ: seed"),
    (["squeeze", "nowhere.yaml"], "nowhere.yaml"),
    (["squeeze", GOOD, "data.source=photos"], "neither a folder here nor a Hub id"),
    (["squeeze", GOOD, "--teachers", "a_file"], "choose a folder with --teachers"),
    (["squeeze", "imagenet/prism_ipc10"], "does not name a `squeeze:` teacher"),
    (["evaluate", "./nowhere"], "neither a folder here nor a Hub id"),
    (["evaluate", "a/b", "--output", "a_file"], "'a_file' is a file"),
    (["compare", "nowhere.yaml"], "nowhere.yaml"),
    (["compare", GOOD, "--data", "photos"], "--data 'photos' is neither"),
    (["compare", GOOD, "data.source=photos"], "data.source 'photos' is neither"),
    (["compare", GOOD, "--output", "a_file"], "'a_file' is a file"),
    (["recipes", "nothing"], "nothing"),
]  # fmt: skip
PROGRAM = """
import contextlib, io, json, sys
from prism_hf.cli.main import main
told = []
for words in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(words)
    told.append([code, err.getvalue(), sorted(sys.modules)])
print(json.dumps(told))
"""


def test_errors_that_need_no_heavy_library_load_none(tmp_path):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    (tmp_path / "other").mkdir()
    recipe = (ROOT / "recipes" / f"{GOOD}.yaml").read_text()
    (tmp_path / "other" / "recipe.yaml").write_text(recipe.replace("\nseed: 0\n", "\nseed: 1\n"))
    command = [sys.executable, "-c", PROGRAM, json.dumps([words for words, _ in WRONG])]
    done = subprocess.run(command, cwd=tmp_path, env=quiet_env(), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for (words, part), (code, text, modules) in zip(WRONG, json.loads(done.stdout), strict=True):
        assert (code, text.count("\n")) == (2, 1), (words, text)
        assert part in text, (words, text)
        assert not HEAVY & set(modules), words


def test_squeeze_and_distill_name_the_folder_of_teachers_alike():
    from prism_hf.cli.main import parse

    given = [parse([command, GOOD, "--teachers", "nets"]).teachers for command in ("distill", "squeeze", "compare")]
    assert given == [Path("nets")] * 3
    assert parse(["squeeze", GOOD]).teachers == Path("outputs/teachers")
