"""How a recipe is read, written, overridden and compared: YAML on one side, a checked `Recipe` on the other."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import RecipeError
from ..runtime.untrusted import PlainLoader
from .schema import (
    DataRecipe,
    EvaluationRecipe,
    PackagingRecipe,
    Recipe,
    RelabelRecipe,
    RelabelView,
    SqueezeRecipe,
    TeachersRecipe,
    to_dict,
)
from .synthesis import ConvStatistics, Densification, Ladder, Mosaic, SynthesisRecipe, SynthesisView

_MOST_VALUES = 10_000
"""A recipe has a few dozen; YAML aliases can make billions out of a few lines."""
_MOST_PROBLEMS = 5
_LONGEST_PROBLEM = 280


class _Dumper(yaml.SafeDumper):
    """Text stays on one line, whatever line ends it holds.

    On a line of its own, a part of it could look like something of the card around it; and PyYAML reads some of the rarer
    line ends back as spaces.
    """


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if len(f"{text}.".splitlines()) > 1 else None  # with double quotes, line ends are escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that gives the very same values back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    return dump_yaml(to_dict(recipe))


def parse_recipe(values: object, *, origin: str = "recipe") -> Recipe:
    """Check plain values and turn them into a `Recipe`.

    Raises:
        RecipeError: One line that names every wrong key, what was expected and what came.
    """
    origin = _short(origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected a mapping of sections, got {type(values).__name__}")
    _check_size(values, origin)
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{origin}: {_short(error)}; use plain YAML values (quote dates)") from error
    _refuse_secrets(values, origin)
    try:
        return TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        problems = [_short(_explain(e)) for e in error.errors()]
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise RecipeError(f"{origin}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}") from error


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
    if kind == "json_invalid":  # not of JSON's making: half a Unicode character, or a number of thousands of digits
        return f"a value cannot be used ({message.removeprefix('Invalid JSON: ')}); use plain YAML values"
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
    ("synthesis", "conv"): ConvStatistics,
    ("synthesis", "densification"): Densification,
    ("synthesis", "mosaic"): Mosaic,
    ("relabel",): RelabelRecipe,
    ("relabel", "view"): RelabelView,
    ("packaging",): PackagingRecipe,
    ("evaluation",): EvaluationRecipe,
}


class _Loader(PlainLoader):
    """Plain YAML in which nothing is lost unsaid: each key stands once, and no section is merged into another."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # PyYAML lets these out at what looks like a date or number and is none (2024-13-45), and at wrong tags.
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            problem = f"a value that looks like {kind} is none; quote it if it is meant as text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as error:
        told = str(error).replace('in "<unicode string>", ', "at ")
        raise RecipeError(f"{what} is not valid YAML: {_short(told)}") from error
    except RecursionError as error:
        raise RecipeError(f"{what} is not valid YAML: nested too deeply, expected sections and their values") from error


def _check_size(values: object, origin: str) -> None:
    """Aliases may also make a value part of itself, so count, and do not recurse."""
    stack, count = [values], 0
    while stack:
        value = stack.pop()
        count += 1
        if count > _MOST_VALUES:
            raise RecipeError(f"{origin}: more than {_MOST_VALUES:,} values; expected a few dozen, write aliases (*) out")
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)


def _short(text: object) -> str:
    """Text for a message: one line, cut where it gets long."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_PROBLEM else f"{line[:_LONGEST_PROBLEM]}..."


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML and apply `dotted.key=value` overrides (values are YAML).

    Raises:
        RecipeError: The file is not there or no YAML, or a value is wrong.
    """
    path = Path(path)
    what = f"recipe {_short(repr(str(path)))}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{what} not found; give the path of a YAML file") from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8
        raise RecipeError(f"{what} cannot be read ({_short(error)}); give the path of a YAML file in UTF-8") from error
    values = _read_yaml(text, what)
    if not isinstance(values, dict):
        raise RecipeError(f"{what}: expected a mapping of sections, got {type(values).__name__}")
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
    what = f"override {_short(repr(override))}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{what}: expected dotted.key=value, for example synthesis.iterations=20")
    value = _read_yaml(text, f"{what}: the value")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values, dict):
            break
        section = values.get(parent)
        if isinstance(section, dict | None):
            section = dict(section or {})  # a copy: an alias may stand for the same section elsewhere
        values[parent] = section
        values = section
    if not isinstance(values, dict):
        raise RecipeError(f"{what}: {_short(repr(key.rpartition('.')[0]))} is a value, not a section")
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
