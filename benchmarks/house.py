"""Print how large and how connected the code is: `python benchmarks/house.py [--root CHECKOUT] [--json before|after]`.

Counted are the Python files below src/prism_hf, the templates beside them, and the four scripts in recipes/.

- lines: of all these files, blank lines and comments included.
- modules: the Python files below src/prism_hf, without `__init__.py`; their median and longest length in lines.
- longest function: of modules and scripts, from `def` to its last line, docstring included, decorators not.
- imports per module: import statements that name other prism_hf modules, those for type checkers and those inside
  functions included, divided by the number of modules.
- packages: lines of the Python files and templates of each folder; a file beside the folders counts by its own name.
- share of method/: its lines divided by all lines.

`--json KEY` keeps the numbers under KEY in benchmarks/results/house.json, beside the limits.
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "house.json"
SCRIPTS = ("prism.py", "squeeze.py", "evaluate.py", "compare.py")
LIMITS = {
    # 12,500 when the packages were made; 300 more for recipes by name, recorded threads and citations; 1,700 more for what
    # strangers' data and teachers need: layouts, columns, pixels, checks of the data, normalizations, norm layers, advice;
    # 600 more for speed: moments, replaced and folded layers, processes that a command starts, compilation, CUDA graphs;
    # 500 more for ImageNet: classes by name, recipes without images, pretrained starts;
    # 1,100 more for ImageNet's scale: labels that fit a budget, folders that are merged, only the needed images read,
    # protocols of students;
    # 500 more for comparisons over sets of teachers: intervals, DD-Ranking's scores and export, easy images and cells,
    # layer norms as statistics, clean statistics
    "lines": 17_200,
    "median_module": 150,
    "longest_module": 350,
    "longest_function": 50,
    "imports_per_module": 4,
}
"""The largest number that is fine."""


def line_count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines, `module.py:name`) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{path.parent.name}/{path.name}:{node.name}"


def own_imports(path: Path) -> int:
    """Import statements of a module that name other prism_hf modules."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            count += node.level > 0 or (node.module or "").partition(".")[0] == "prism_hf"
        elif isinstance(node, ast.Import):
            count += any(name.name.partition(".")[0] == "prism_hf" for name in node.names)
    return count


def measure(root: Path) -> dict[str, object]:
    """The numbers of a checkout."""
    source = root / "src" / "prism_hf"
    python, templates = sorted(source.rglob("*.py")), sorted(source.rglob("*.jinja"))
    scripts = [root / "recipes" / name for name in SCRIPTS]
    modules = {path: line_count(path) for path in python if path.name != "__init__.py"}
    longest = max(modules, key=lambda path: modules[path])
    function_lines, function = max(item for path in (*python, *scripts) for item in functions(path))
    packages: Counter[str] = Counter()
    for path in (*python, *templates):
        packages[path.relative_to(source).parts[0]] += line_count(path)
    lines = sum(line_count(path) for path in (*python, *templates, *scripts))
    imports = sum(own_imports(path) for path in modules)
    return {
        "lines": lines,
        "modules": len(modules),
        "median_module": statistics.median(modules.values()),
        "longest_module": modules[longest],
        "longest_module_name": longest.relative_to(source).as_posix(),
        "longest_function": function_lines,
        "longest_function_name": function,
        "imports": imports,
        "imports_per_module": round(imports / len(modules), 2),
        "share_of_method": round(packages["method"] / lines, 4),
        "packages": {name: packages[name] for name in sorted(packages)} | {"recipes": sum(map(line_count, scripts))},
    }


def describe(facts: dict[str, object]) -> str:
    """The numbers for a terminal, each with its limit."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"  {package:<22} {count}" for package, count in value.items() if count > 0]
        else:
            lines.append(f"{name:<24} {value}" + (f"  (limit {LIMITS[name]})" if name in LIMITS else ""))
    return "\n".join(lines)


def main() -> None:
    """Print the numbers, and keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, flat or in packages")
    parser.add_argument("--json", choices=("before", "after"), help="keep the numbers under this key")
    args = parser.parse_args()
    facts = measure(args.root)
    sys.stdout.write(describe(facts) + "\n")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.root, capture_output=True, text=True, check=True)
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        # What is checked out: for a record that is committed together with its code, the commit before.
        record |= {"limits": LIMITS, args.json: {"commit": commit.stdout.strip()[:12], **facts}}
        ordered = {key: record[key] for key in ("limits", "before", "after") if key in record}
        RECORD.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
