"""The wheel: an installation of prism-hf without a clone."""

import json
import subprocess
import sys
import zipfile

import pytest
from fresh_environment import fresh_environment
from pipeline import ROOT, TINY

import prism_hf
from prism_hf.recipe import shipped_recipes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True)
    return folder / made.stdout.split()[-1]


def test_the_wheel_contains_the_package_and_every_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"prism_hf-{prism_hf.__version__}-" in wheel.name
    assert names >= {f"prism_hf/recipes/{name}.yaml" for name in shipped_recipes()}
    assert "prism_hf/recipes/accelerate/multi_gpu.yaml" in names
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "prism_hf").rglob("*") if path.is_file()}
    assert names >= {name for name in files if "__pycache__" not in name}


@pytest.mark.slow
def test_the_wheel_distills_in_a_fresh_environment(wheel, tmp_path):
    env = fresh_environment(tmp_path / "venv") | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("pip", "install", "-q", "--no-deps", str(wheel))
    assert run("python", "-c", "import prism_hf; print(prism_hf.__file__)").startswith(str(tmp_path / "venv"))
    assert [line.split()[0] for line in run("prism-hf", "recipes").splitlines()] == list(shipped_recipes())
    out = run("accelerate", "launch", "-m", "prism_hf", "digits/prism_ipc10", *TINY)
    assert "random real" in out
    assert f"dataset: outputs/{prism_hf.load_recipe('digits/prism_ipc10').name}/dataset" in out
    (report,) = tmp_path.glob("outputs/*/report.json")
    assert json.loads(report.read_text())["evaluation"]["rows"]
    script = tmp_path / "script.py"
    script.write_text(
        "import prism_hf, sys\n"
        "print(prism_hf.distill('digits/prism_ipc10', 'from-python', sys.argv[1:], teachers='outputs/teachers').dataset)\n"
    )
    assert run("python", str(script), *TINY).split()[-1] == "from-python/dataset"
