"""The wheel: what somebody gets who installs prism-hf without a clone."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from pipeline import ROOT, TINY, quiet_env

import prism_hf
from prism_hf.recipe import shipped_recipes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True)
    return folder / made.stdout.split()[-1]


def test_the_wheel_holds_the_package_and_every_recipe(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert f"prism_hf-{prism_hf.__version__}-" in wheel.name
    recipes = {name for name in names if name.startswith("prism_hf/recipes/") and name.endswith(".yaml")}
    assert recipes >= {f"prism_hf/recipes/{name}.yaml" for name in shipped_recipes()}
    assert "prism_hf/recipes/accelerate/multi_gpu.yaml" in names
    source = ROOT / "src" / "prism_hf"
    files = {
        path.relative_to(source.parent).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= set(names)


@pytest.mark.slow
def test_the_wheel_distills_in_a_fresh_environment(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    # The dependencies of this environment, but not this checkout: its own .pth file is not read from there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {key: value for key, value in quiet_env().items() if key != "PYTHONPATH"}
    env["PATH"] = f"{venv / 'bin'}{os.pathsep}{env['PATH']}"

    def run(*words):
        done = subprocess.run([python, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run([python, "-c", "import prism_hf; print(prism_hf.__file__)"], cwd=tmp_path, env=env,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert where.stdout.startswith(str(venv))
    assert [line.split()[0] for line in run("prism_hf", "recipes").splitlines()] == list(shipped_recipes())
    out = run(
        "accelerate.commands.accelerate_cli", "launch", "-m", "prism_hf", "digits/prism_ipc10", *TINY, "--threads", "1"
    )
    assert "random real" in out
    (report,) = tmp_path.glob("outputs/*/report.json")
    assert json.loads(report.read_text())["evaluation"]["rows"]
    # The same from Python.
    code = (
        "import prism_hf, sys; print(prism_hf.distill('digits/prism_ipc10', sys.argv[1], sys.argv[2:], threads=1).dataset)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    words = [python, str(script), "python-run", *TINY]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "python-run/dataset"
