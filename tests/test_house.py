"""The code metrics of `benchmarks/house.py`: they are counted correctly and stay within their limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import house  # noqa: E402

MODULE = '''"""A module."""
import os
from pathlib import Path
from typing import TYPE_CHECKING
from . import a
from .b import c, d
if TYPE_CHECKING:
    from ..e import f


@property
def outer():
    """Six lines."""
    import prism_hf.g

    def inner():
        return os, Path, a, c, d, prism_hf
'''


@pytest.fixture
def checkout(tmp_path):
    source = tmp_path / "src" / "prism_hf"
    (source / "method" / "templates").mkdir(parents=True)
    (source / "__init__.py").write_text("from .x import y\n" * 40)
    (source / "errors.py").write_text("class E: ...\n" * 3)
    (source / "method" / "one.py").write_text(MODULE)
    (source / "method" / "templates" / "card.md.jinja").write_text("a\n\nb")
    (tmp_path / "recipes").mkdir()
    for name in house.SCRIPTS:
        (tmp_path / "recipes" / name).write_text("import sys\n")
    return tmp_path


def test_the_counts_are_correct(checkout):
    facts = house.measure(checkout)
    length = MODULE.count("\n")
    assert facts["lines"] == 40 + 3 + length + 3 + 4
    assert (facts["modules"], facts["median_module"], facts["longest_module"]) == (2, (3 + length) / 2, length)
    assert facts["longest_module_name"] == "method/one.py"
    assert (facts["longest_function"], facts["longest_function_name"]) == (6, "method/one.py:outer")
    assert (facts["imports"], facts["imports_per_module"]) == (4, 2.0)
    assert facts["packages"] == {"__init__.py": 40, "errors.py": 3, "method": length + 3, "recipes": 4}
    assert facts["share_of_method"] == round((length + 3) / facts["lines"], 4)


@pytest.mark.parametrize("name", house.LIMITS)
def test_the_package_stays_within_its_limits(name):
    assert house.measure(ROOT)[name] <= house.LIMITS[name]


def test_the_script_prints_every_number(checkout):
    words = [sys.executable, str(ROOT / "benchmarks" / "house.py"), "--root", str(checkout)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for name in house.LIMITS:
        assert name in printed


def test_the_record_has_the_state_before_and_after():
    record = json.loads(house.RECORD.read_text())
    assert record["limits"] == house.LIMITS
    assert record["before"]["lines"] == 14_683
    assert record["before"]["modules"] == 62
    assert record["after"].keys() == record["before"].keys()
