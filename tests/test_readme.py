"""The README and docs/python.md: every code block runs for a user who has nothing else installed."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fresh_environment import IN_TESTS, fresh_environment
from hub_fixtures import hub  # noqa: F401
from PIL import Image
from sklearn.datasets import load_digits

import prism_hf
from prism_hf.cli.main import parse
from prism_hf.runtime import read_yaml

# ruff: noqa: F811
ROOT = Path(__file__).parents[1]
README, PYTHON = (ROOT / name for name in ("README.md", "docs/python.md"))
RUN = {"bash", "python", "yaml"}
SHOWN = {"text", "mermaid", "bibtex"}


def blocks(path, *languages):
    """Return (language, code) of the fenced blocks, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= RUN | SHOWN
    return [(language, code) for language, code in found if language in (languages or RUN)]


def test_every_public_name_is_shown_and_every_shown_name_is_public():
    code = "\n".join(text for path in (README, PYTHON) for _, text in blocks(path, "python"))
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    assert {node.attr for node in nodes if ast.unparse(node.value) == "prism_hf"} == set(prism_hf.__all__)


def test_every_command_of_the_readme_parses():
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"`((?:accelerate launch|prism-hf) [^`\n]+)`", text)
    lines = [line for _, code in blocks(README, "bash") for line in code.splitlines()]
    commands += [line for line in lines if line.startswith(("accelerate launch", "prism-hf"))]
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "accelerate":
            start = next(i for i, word in enumerate(words) if word.endswith((".py", "prism_hf")))
            script = Path(words[start])
            assert script.name == "prism_hf" or (ROOT / script).is_file(), command
            words = [*{"prism_hf": [], "prism": ["distill"]}.get(script.stem, [script.stem]), *words[start + 1 :]]
        else:
            words = words[1:]
        assert parse(words).run, command


SCORE = """
from prism_hf.images import load_source
test = load_source(__import__("prism_hf").load_recipe("digits/prism_ipc10").data).test
x = (test.images(range(len(test))).float() / 255 - 0.5) / 0.5
top1 = (student.eval()(x).argmax(1) == torch.as_tensor(test.labels)).float().mean()
assert top1 > 0.8, top1
"""
"""Code that scores the student of the README's plain loop on real test digits."""


@pytest.mark.slow
def test_the_readme_works_from_clone_to_published_dataset(hub, tmp_path):
    """Run it verbatim: clone, install, distill, train, call from Python, distill own data, publish, load."""
    origin = tmp_path / "origin"
    ignored = shutil.ignore_patterns(".git", "outputs", "__pycache__", ".*_cache", ".hypothesis", ".venv*", "dist", "build")
    shutil.copytree(ROOT, origin, ignore=ignored)
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A", "-f"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    address = re.search(r"git clone (\S+)", README.read_text())[1]
    client = hub.env(token=hub.add_user("ann", orgs=("ORG",)), home=tmp_path / "home", xet=False)
    env = {key: value for key, value in client.items() if key not in ("PATH", "VIRTUAL_ENV", *IN_TESTS)}
    env = fresh_environment(tmp_path / "venv") | env | {"TQDM_DISABLE": "1"}
    env |= {"HOME": str(tmp_path / "home"), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf"}
    env |= {"GIT_CONFIG_VALUE_0": address}
    (tmp_path / "home").mkdir()
    place = tmp_path

    def run(*words):
        done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = []
    for number, (language, code) in enumerate(blocks(README)):
        if language == "bash":
            *shown, place = run("bash", "-euo", "pipefail", "-c", f"{code}pwd").splitlines()
            output += shown
        elif language == "python":
            script = tmp_path / f"block{number}.py"
            script.write_text(code + (SCORE if "student" in code else ""))
            output += run("python", str(script)).splitlines()
        else:
            recipe = (Path(place) / "recipes/your_data/prism_ipc10.yaml").read_text()
            for key, value in read_yaml(code)["data"].items():
                recipe, count = re.subn(rf"^  {key}: \S+", f"  {key}: {value}", recipe, flags=re.MULTILINE)
                assert count == 1
            (Path(place) / "my_recipe.yaml").write_text(recipe)
            photos(Path(place) / "photos")
    (header,) = re.findall(r"^images +count .*$", README.read_text(), re.MULTILINE)
    assert sum(line == header for line in output) == 3  # the digits, one image per class from Python, and own data
    assert (Path(place) / "outputs/my-dataset/dataset/README.md").is_file()
    everything = "".join(code for _, code in blocks(PYTHON, "python"))
    (tmp_path / "api.py").write_text(everything)
    assert "ORG/digits-prism-ipc1" in run("python", str(tmp_path / "api.py"))


def photos(folder):
    """Write colored images of three digits, one folder each, like a user's own photos."""
    source, rng = load_digits(), np.random.default_rng(0)
    for name, digit in (("zero", 0), ("one", 1), ("two", 2)):
        (folder / name).mkdir(parents=True)
        for number, row in enumerate(np.flatnonzero(source.target == digit)[:60]):
            gray = np.asarray(Image.fromarray((source.images[row] * 15).astype(np.uint8)).resize((96, 72)))
            color = gray[..., None] * rng.uniform(0.5, 1.0, 3)
            Image.fromarray(color.astype(np.uint8)).save(folder / name / f"{number}.jpg")
