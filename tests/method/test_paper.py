"""`method/` contains only the science of the paper, and docs/method.md has one section per file."""

import ast
import re
from pathlib import Path

import pytest

import prism_hf.method

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "src/prism_hf/method").glob("*.py") if path.name != "__init__.py")
MACHINERY = {
    "os", "io", "json", "time", "pathlib", "shutil", "tempfile", "logging", "threading", "signal", "multiprocessing",
    "subprocess", "socket", "urllib", "accelerate", "datasets", "huggingface_hub", "safetensors", "filelock", "tqdm",
}  # fmt: skip
OURS = {"errors", "images", "method", "models", "recipe", "runtime.derived_seed", "runtime.to_device", "runtime.Replayed"}


def imported(path):
    """Return the modules that a file imports: others by top-level name, ours by package, and each name of `runtime`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            package = "method" if node.level == 1 else node.module.partition(".")[0]
            names = [f"runtime.{name.name}" for name in node.names] if package == "runtime" else [package]
            yield from (f"ours:{name}" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_method_imports_no_files_locks_checkpoints_progress_signals_or_network(path):
    names = set(imported(path))
    assert not names & MACHINERY
    assert {name.removeprefix("ours:") for name in names if name.startswith("ours:")} <= OURS


def test_document_has_a_section_per_file_in_the_order_of_the_package():
    headings = re.findall(r"^## .*: `(\w+)\.py`$", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == [path.stem for path in FILES]
    assert re.findall(r"^(\w+) {2,}\S", prism_hf.method.__doc__, re.MULTILINE) == headings
