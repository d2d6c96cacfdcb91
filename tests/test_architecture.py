import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from each import each

import prism_hf
from prism_hf import runtime

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "prism_hf"
MODULES = sorted(path for path in SRC.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
# Low to high: a package imports only from itself and from the packages before it.
PACKAGES = "errors runtime recipe images models method dataset evaluation hub run compare cli".split()


def file_of(module):
    """Return the file of a module: runtime/store.py for `runtime.store`, runtime/__init__.py for `runtime`."""
    path = SRC / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def name_of(path):
    """Return the module name, `runtime.store` for src/prism_hf/runtime/store.py."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


LATER = {name: module for module, names in runtime._LATER.items() for name in names.split()}
"""Name -> the module from which `runtime/__init__.py` imports it on first use."""

every_module = each("path", MODULES)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def run_time_tree(path):
    """Return the tree without the parts for type checkers only."""
    found = tree(path)
    found.body = [
        node for node in found.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return found


def imports(path, read=tree):
    """Yield (top-level package, our module or None) for every import statement, including those inside functions.

    A name that an `__init__.py` imports on first use also yields the module that defines it.
    """
    folder = path.relative_to(SRC).parts[:-1]
    for node in ast.walk(read(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], None
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level]
            assert node.level <= len(folder) + 1, f"{path.name}: import from above the package"
            ours = ".".join([*above, node.module] if node.module else above)
            yield "prism_hf", ours
            if ours == "runtime":
                yield from (("prism_hf", f"runtime.{LATER[name.name]}") for name in node.names if name.name in LATER)


def graph():
    """Return the imported modules of each module."""
    return {name_of(path): {ours for _, ours in imports(path) if ours} for path in MODULES}


def test_the_list_of_packages_is_complete():
    assert {name_of(path).split(".")[0] for path in MODULES} == set(PACKAGES)


@every_module
def test_packages_import_only_from_lower_packages(path):
    def floor(module):
        return PACKAGES.index(module.split(".")[0])

    back = [module for _, module in imports(path) if module and floor(module) > floor(name_of(path))]
    assert not back, f"{name_of(path)} imports {back}, which are above it"


def faces():
    """Return the names that each package's `__init__.py` exports, including those imported on first use."""
    found = {}
    for package in PACKAGES[1:]:
        nodes = [node for node in ast.walk(tree(SRC / package / "__init__.py")) if isinstance(node, ast.ImportFrom)]
        found[package] = {name.name for node in nodes if node.level for name in node.names}
    return found


def test_lazily_imported_names_match_what_type_checkers_see():
    path = SRC / "runtime" / "__init__.py"
    seen, at_once = (
        [node for node in ast.walk(read(path)) if isinstance(node, ast.ImportFrom)] for read in (tree, run_time_tree)
    )
    behind = {node.module for node in at_once}
    typed = {name.name: node.module for node in seen if node.module not in behind for name in node.names}
    assert typed == LATER
    for name, module in LATER.items():
        assert getattr(runtime, name) is getattr(importlib.import_module(f"prism_hf.runtime.{module}"), name)
    with pytest.raises(AttributeError, match="'prism_hf.runtime' has no attribute 'nothing'"):
        _ = runtime.nothing


@every_module
def test_names_are_imported_from_the_package_that_exports_them(path):
    """Import a name that a package exports from the package, so that a reader sees what packages share."""
    offered, own = faces(), name_of(path).split(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            package, _, module = (node.module or "").partition(".")
            if module and package != own and node.level == len(path.relative_to(SRC).parts):
                behind = {name.name for name in node.names} & offered[package]
                assert not behind, f"{path.name}:{node.lineno} import {sorted(behind)} from prism_hf.{package}"


def test_no_exported_name_hides_a_module():
    for package, names in faces().items():
        assert not names & {path.stem for path in (SRC / package).glob("*.py")}, package


def test_there_are_no_circular_imports():
    found = graph()
    while leaves := [name for name, ours in found.items() if not ours & set(found)]:
        found = {name: ours for name, ours in found.items() if name not in leaves}
    assert not found


@every_module
def test_no_module_imports_recipes_tests_or_prism_hf_by_name(path):
    assert not {package for package, module in imports(path) if module is None} & {"recipes", "tests", "prism_hf"}


@each("name", ["errors", "recipe.schema", "recipe.yaml_file", "recipe.plan", "recipe.describe"])
def test_light_modules_import_nothing_heavy(name):
    seen = queue = [name]
    while queue:
        found = [item for module in queue for item in imports(file_of(module), run_time_tree)]
        heavy = {package for package, _ in found} & {"torch", "numpy", "timm", "datasets", "transformers", "accelerate"}
        assert not heavy, name
        queue = sorted({ours for _, ours in found if ours} - set(seen))
        seen = [*seen, *queue]


@pytest.mark.parametrize(
    ("name", "heavy"),
    [("recipe", {"torch", "accelerate", "timm", "datasets"}), ("runtime", {"torch", "accelerate", "huggingface_hub"})],
)
def test_light_packages_load_nothing_heavy(name, heavy):
    names = [name, *(name_of(path) for path in MODULES if path.parent.name == name == "recipe")]
    loads = "; ".join(f"import prism_hf.{module}" for module in names)
    code = f"import sys; {loads}; sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


QUICK = {
    "the plan": ("prism.py --dry-run", 0, "fingerprint"),
    "help": ("prism.py --help", 0, "usage: accelerate launch recipes/prism.py "),
    "help of evaluate": ("evaluate.py --help", 0, "accelerate launch recipes/evaluate.py DATASET"),
    "a comparison": ("compare.py digits/prism_ipc10.yaml digits/sre2l_ipc10.yaml --dry-run", 0, "3 methods"),
    "a wrong recipe": ("prism.py synthesis.ipc=many", 2, "RecipeError: "),
    "no recipe": ("squeeze.py nowhere.yaml", 2, "RecipeError: "),
}


@pytest.mark.parametrize("kind", QUICK)
def test_dry_runs_help_and_recipe_errors_do_not_load_torch(kind):
    words, expected, told = QUICK[kind]
    code = (
        f"import runpy, sys; sys.argv = {words.split()}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"except SystemExit as end: assert (end.code or 0) == {expected}, end.code\n"
        "assert not {'torch', 'timm', 'datasets', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "recipes", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert told in done.stdout + done.stderr


@every_module
def test_no_print_cuda_calls_star_imports_or_sys_path(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = node.func
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path.name}:{node.lineno} print"
            assert not (isinstance(called, ast.Attribute) and called.attr == "cuda"), f"{path.name}:{node.lineno} .cuda("
        if isinstance(node, ast.ImportFrom):
            assert all(name.name != "*" for name in node.names), f"{path.name}:{node.lineno} star import"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path"), f"{path.name}:{node.lineno} sys.path"


WRITES = {
    "create_repo", "create_commit", "create_branch", "create_tag", "create_pull_request", "create_discussion",
    "upload_file", "upload_folder", "preupload_lfs_files", "delete_repo", "delete_file", "delete_folder",
    "delete_branch", "push_to_hub", "push_to_hf_hub", "metadata_update", "update_repo_settings",
    "change_discussion_status", "merge_pull_request",
}  # fmt: skip


def hub_writes(path):
    return {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)} & WRITES


def test_only_the_hub_package_writes_to_the_network():
    assert "create_commit" in hub_writes(SRC / "hub" / "push.py")
    assert not {name_of(p): found for p in MODULES if p.parent.name != "hub" and (found := hub_writes(p))}


@every_module
def test_no_global_seed_and_no_bare_except(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"
        if isinstance(node, ast.Attribute) and node.attr in ("manual_seed_all", "set_seed"):
            pytest.fail(f"{path.name}:{node.lineno} touches the global random state")


@every_module
def test_each_module_has_a_docstring(path):
    text = ast.get_docstring(tree(path))
    assert text
    assert text.splitlines()[0].rstrip().endswith((".", ";", ":")) or len(text.splitlines()) > 1


def test_public_names_are_few_sorted_and_documented():
    names = prism_hf.__all__
    assert len(names) <= 20
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        value = getattr(prism_hf, name)
        assert inspect.getdoc(value), name
        assert value.__module__.startswith("prism_hf."), name


def test_each_package_has_its_tests():
    for package in PACKAGES[1:]:
        assert list((ROOT / "tests" / package).glob("test_*.py")), package


def test_no_catch_all_modules():
    assert not {"utils", "helpers", "common", "base", "misc"} & {p.stem for p in MODULES}


def test_every_error_is_a_prism_error():
    from prism_hf import errors

    kinds = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert len(kinds) > 5
    assert all(issubclass(kind, errors.PrismError) and inspect.getdoc(kind) for kind in kinds)
