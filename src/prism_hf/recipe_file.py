"""How a recipe is read, written, overridden and compared: YAML on one side, a checked `Recipe` on the other."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import RecipeError
from .outside import read_yaml
from .recipe import (
    DataRecipe,
    EvaluationRecipe,
    Ladder,
    PackagingRecipe,
    Recipe,
    RelabelRecipe,
    RelabelView,
    SqueezeRecipe,
    SynthesisRecipe,
    SynthesisView,
    TeachersRecipe,
    to_dict,
)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def parse_recipe(values: object, *, origin: str = "recipe") -> Recipe:
    """Check plain values and turn them into a `Recipe`.

    Raises:
        RecipeError: One line that names every wrong key, what was expected and what came.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected a mapping of sections, got {type(values).__name__}")
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{origin}: {error}; use plain YAML values (quote dates)") from error
    _refuse_secrets(values, origin)
    try:
        return TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        problems = "; ".join(_explain(e) for e in error.errors())
        raise RecipeError(f"{origin}: {problems}") from error


_SECRET = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}|://[^/\s@]*:[^/\s@]+@")


def _refuse_secrets(value: object, origin: str, key: str = "") -> None:
    """A recipe is published with its data set, so an access token or a password in it is refused, and not repeated."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_secrets(str(name), origin, key)
            _refuse_secrets(item, origin, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for item in value:
            _refuse_secrets(item, origin, key)
    elif isinstance(value, str) and _SECRET.search(value):
        raise RecipeError(
            f"{_SECRET.sub('...', origin)}: {_SECRET.sub('...', key) or 'a key'} holds an access token or a password, and "
            "recipes are published; take it out, and set HF_TOKEN or run `hf auth login`"
        )


def _explain(error: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in dataclasses.fields(_SECTIONS[tuple(error["loc"][:-1])])]
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {path!r}, {hint}"
    if kind in ("missing", "missing_argument"):
        return f"{path!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {json.dumps(error['input'])[:80]}"


_SECTIONS: dict[tuple[str, ...], type] = {
    (): Recipe,
    ("data",): DataRecipe,
    ("teachers",): TeachersRecipe,
    ("squeeze",): SqueezeRecipe,
    ("synthesis",): SynthesisRecipe,
    ("synthesis", "view"): SynthesisView,
    ("synthesis", "ladder"): Ladder,
    ("relabel",): RelabelRecipe,
    ("relabel", "view"): RelabelView,
    ("packaging",): PackagingRecipe,
    ("evaluation",): EvaluationRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML and apply `dotted.key=value` overrides (values are YAML).

    Raises:
        RecipeError: The file is not there or no YAML, or a value is wrong.
    """
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {str(path)!r} not found; give the path of a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {str(path)!r}: expected a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, origin=str(path))


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `dotted.key=value` overrides applied, checked again."""
    values = to_dict(recipe)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, origin=recipe.name)


def _apply(values: object, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected dotted.key=value, for example synthesis.iterations=20")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values, dict):
            break
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
    if not isinstance(values, dict):
        raise RecipeError(f"override {override!r}: {key.rpartition('.')[0]!r} is a value, not a section")
    values[last] = value


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe that ships: absolute local paths of data and teachers are cut to their last part.

    Everything else is equal, so recipes without such paths are shipped as they are.
    """
    values = to_dict(recipe)

    def cut(text: str) -> str:
        if "://" in text:  # an address, as of a licence, says nothing about this machine
            return text
        scheme, colon, place = text.rpartition(":")
        return f"{scheme}{colon}{Path(place).name}" if Path(place).is_absolute() else text

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return cut(value) if isinstance(value, str) else value

    return parse_recipe(walk(values), origin=f"{recipe.name}, for the public")


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys whose values differ between two recipes, the name aside."""

    def flat(values: object, prefix: str) -> dict[str, object]:
        if not isinstance(values, dict):
            return {prefix: values}
        return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}

    left, right = flat(to_dict(a), ""), flat(to_dict(b), "")
    keys = [k for k in {**left, **right} if left.get(k) != right.get(k) and k != "name"]
    return keys
