"""Count the bad-input test cases that pass, by kind of input.

python benchmarks/refusals.py --record benchmarks/results/refusals.json
"""

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FOLDERS, _CONSOLE = "folders, stages, trackers", "prism-hf verify, export, push"
GROUPS = {
    "recipe": "recipe files", "value": "recipe values", "override": "overrides", "teacher": "teachers",
    "student": "teachers", "data": "data", "output": _FOLDERS, "stage": _FOLDERS, "teachers": _FOLDERS, "tracker": _FOLDERS,
    "evaluate": "evaluate.py", "verify": _CONSOLE, "export": _CONSOLE, "push": _CONSOLE,
}  # fmt: skip
"""Group of a test case, by the first word of its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_bad_input.py", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    groups: Counter[str] = Counter()
    passed = 0
    for case in cases:
        match = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name") or "", flags=re.DOTALL)
        if match is None:
            continue  # not a bad-input case: it checks that good input is accepted
        kind = match[2].partition(":")[0]
        groups["answers of the Hub" if "hub" in match[1] else GROUPS.get(kind, "others")] += 1
        passed += not len(case)
    facts = {
        "cases": sum(groups.values()),
        "passed": passed,
        "by_group": dict(groups),
        "command": "python benchmarks/refusals.py",
    }
    sys.stdout.write(f"{facts}\n")
    if args.record:
        import machine

        from prism_hf.runtime.store import write_json

        write_json(args.record, facts | machine.facts())


if __name__ == "__main__":
    main()
