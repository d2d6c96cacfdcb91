"""The documentation: commands, tables and snippets in README, docs and cards match the code."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prism_hf.cli.main import parse
from prism_hf.hub.dataset_card import REPLAY

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]


def commands():
    for path in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"accelerate launch .*?recipes/(\w+)\.py(.*)", line.partition("  #")[0])
                if found:
                    yield pytest.param(path.name, found[1], found[2], id=f"{path.stem}-{line.strip()[:60]}")


@pytest.mark.parametrize(("document", "name", "arguments"), list(commands()))
def test_every_documented_command_parses(document, name, arguments):
    args = parse([{"prism": "distill"}.get(name, name), *shlex.split(arguments)])
    for word in args.words:
        if word.endswith(".yaml") and "/" in word:
            assert (ROOT / word).is_file(), f"{document}: {word}"


def shared():
    for path in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in re.findall(r"^prism-hf (.*)$", block, re.MULTILINE):
                yield pytest.param(line.partition("  #")[0], id=f"{path.stem}-{line[:50]}")


@pytest.mark.parametrize("arguments", list(shared()))
def test_every_documented_sharing_command_parses(arguments):
    assert parse(shlex.split(arguments)).run


def test_the_readme_names_the_commands_that_ci_runs():
    readme, ci = (p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / ".ci" / "run"))
    assert "pip install -e .\naccelerate launch recipes/prism.py" in readme
    assert "pip install -e '.[test]' && pytest" in readme
    assert "pip install -q -e '.[test]'" in ci
    assert re.search(r"^accelerate launch recipes/prism\.py", ci, re.MULTILINE)
    assert re.search(r'^pytest -m "not gpu and not hub"$', ci, re.MULTILINE), (
        "those of the README's pytest, and the slow ones"
    )


def test_the_replay_in_the_docs_is_the_one_that_is_tested():
    assert f"```python\n{REPLAY.strip()}\n```" in (ROOT / "docs" / "dataset_format.md").read_text(encoding="utf-8")


def test_links_inside_the_repository_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


HAND_WRITTEN = [*sorted(ROOT.glob("*.md")), *DOCUMENTS[1:]]
NOT_WRAPPED = re.compile(
    r"^<!-- results:.*?^<!-- end -->$|^```.*?^```$"  # tables written by benchmarks/render.py, and code
    r"|^\|.*?$|^[ \t]*(?:[-*] )?!?\[[^\n]*\]\([^\n]*\)[.,;]?$",  # table rows, and links alone on a line
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_hand_written_lines_are_short(path):
    text = NOT_WRAPPED.sub("", path.read_text(encoding="utf-8"))
    assert [line for line in text.splitlines() if len(line) >= 120] == []


@pytest.mark.slow  # .ci/run checks it as well
def test_cards_and_tables_are_rendered_from_the_recorded_results():
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_digits_recipe_has_its_recorded_result_and_card():
    for path in sorted((ROOT / "recipes" / "digits").glob("*.yaml")):
        name = re.search(r"^name: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").is_file(), name
        assert (ROOT / "cards" / f"{name}.md").is_file(), name
