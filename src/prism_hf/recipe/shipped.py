"""Shipped recipes: the YAML files that come with prism-hf, by name."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def shipped_recipes() -> dict[str, Path]:
    """Return the path of every shipped recipe by its name, such as `digits/prism_ipc10`, in alphabetical order."""
    # A wheel has them inside the package, a checkout beside src/.
    folder = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent.parent / "recipes"
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.glob("*/*.yaml")}
    return {name: paths[name] for name in sorted(paths) if not name.startswith("accelerate/")}


def title_of(path: Path) -> str:
    """Return the first line of a recipe file, which says in a comment what the recipe makes."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
