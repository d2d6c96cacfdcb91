"""Recipes as YAML: read, override, check, write and compare them."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import RecipeError
from ..runtime import YamlError, dump_yaml, map_texts, read_yaml
from .presets import preset_values
from .schema import Recipe, to_dict
from .shipped import shipped_recipes

_MOST_VALUES = 10_000
"""A recipe has a few dozen values; YAML aliases can turn a few lines into billions."""
_MOST_PROBLEMS = 5
_LONGEST_PROBLEM = 280
_SECRET = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}|://[^/\s@]*:[^/\s@]+@")
"""An access token, or a URL with a password."""


Overrides = Sequence[str] | Mapping[str, object]
"""Changes of a recipe: `dotted.key=value` with YAML values, as on the command line, or a mapping of dotted keys."""


def load_recipe(path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe and apply overrides; `path` is a YAML file, or the name of a shipped recipe (`digits/prism_ipc10`).

    Raises:
        RecipeError: The file is missing or is not YAML, or a value is wrong.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises at long names
        path = shipped_recipes().get(path.as_posix().removesuffix(".yaml"), path)
    what = f"recipe {_short(repr(str(path)))}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{what} not found; give a YAML file, or a name that `prism-hf recipes` lists") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise RecipeError(f"{what} cannot be read ({_short(error)}); give the path of a YAML file in UTF-8") from error
    return parse_recipe(_read_yaml(text, what), overrides, origin=str(path))


def override_recipe(recipe: Recipe, overrides: Overrides) -> Recipe:
    """Apply overrides to a recipe, and check the result."""
    return parse_recipe(to_dict(recipe), overrides, origin=recipe.name)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, from which `load_recipe` gives an equal recipe."""
    return dump_yaml(to_dict(recipe))


def parse_recipe(values: object, overrides: Overrides = (), *, origin: str = "recipe") -> Recipe:
    """Check plain values, with overrides applied, and turn them into a `Recipe`.

    Raises:
        RecipeError: One line that names every wrong key, the expected value and the actual one.
    """
    origin = _short(origin)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected a mapping of sections, got {type(values).__name__}")
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in overrides.items()]
    # A preset replaces the protocol of the recipe, but not what other overrides set.
    for override in sorted(overrides, key=lambda text: not text.startswith("evaluation.preset=")):
        values = _overridden(values, override)
    values = _with_preset(values)
    _check_size(values, origin)
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{origin}: {_short(error)}; use plain YAML values") from error
    _refuse_secrets(values, origin)
    try:
        return TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        problems = [_short(_explain(e)) for e in error.errors()]
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise RecipeError(f"{origin}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}") from error


def public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe to publish: absolute local paths of data and teachers are cut to their last part."""
    return parse_recipe(map_texts(to_dict(recipe), without_folders), origin=f"{recipe.name}, to be published")


def flat_values(recipe: Recipe) -> dict[str, object]:
    """Return all values by dotted key."""

    def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(flat(to_dict(recipe), ""))


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Return the dotted keys whose values differ between two recipes, except for the name."""
    flat_a, flat_b = flat_values(a), flat_values(b)
    return [key for key in flat_a | flat_b if flat_a.get(key) != flat_b.get(key) and key != "name"]


def _read_yaml(text: str, what: str) -> Any:
    try:
        return read_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{what} is not valid YAML: {_short(error)}") from error


def _overridden(values: dict[Any, Any], override: str) -> dict[Any, Any]:
    """Apply one `dotted.key=value` to a copy, since a YAML alias may share the same section with another key."""
    what = f"override {_short(repr(override))}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{what}: expected dotted.key=value, for example synthesis.iterations=20")
    *parents, last = key.split(".")
    changed = section = dict(values)
    for parent in parents:
        inner = section.get(parent)
        if not isinstance(inner, dict | None):
            raise RecipeError(f"{what}: {_short(repr(key.rpartition('.')[0]))} is a value, not a section")
        inner = dict(inner or {})
        section[parent] = inner
        section = inner
    section[last] = _read_yaml(text, f"{what}: the value")
    if key == "evaluation.preset":  # replaces the values of another protocol
        for name in preset_values(section[last]):
            section.pop(name, None)
    return changed


def _with_preset(values: dict[Any, Any]) -> dict[Any, Any]:
    """Add the values of a preset that the recipe does not set itself."""
    evaluation = values.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("preset") is None:
        return values
    preset = preset_values(evaluation["preset"])
    return {**values, "evaluation": {**preset, **evaluation}}


def _check_size(values: object, origin: str) -> None:
    """Refuse too many values. YAML aliases may make a value a part of itself, so this counts instead of recursing."""
    pending = [values]
    for value in pending:  # the list grows during the loop
        if len(pending) > _MOST_VALUES:
            raise RecipeError(f"{origin}: more than {_MOST_VALUES:,} values; expected a few dozen; write aliases (*) out")
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _refuse_secrets(value: object, origin: str, key: str = "") -> None:
    """Refuse an access token or a password, since recipes are published. The message does not repeat it."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_secrets(str(name), origin, key)
            _refuse_secrets(item, origin, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for item in value:
            _refuse_secrets(item, origin, key)
    elif isinstance(value, str) and _SECRET.search(value):
        raise RecipeError(
            f"{_SECRET.sub('...', origin)}: {_SECRET.sub('...', key) or 'a key'} contains an access token or a password, "
            "but recipes are published; remove it, and set HF_TOKEN or run `hf auth login`"
        )


def _explain(error: Mapping[str, Any]) -> str:
    """Describe one problem of a `ValidationError`."""
    path = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            *section, key = map(str, error["loc"])
            known = _keys_of(section)
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(known)}"
            return f"unknown key {path!r}, {hint}"
        case "missing" | "missing_argument":
            return f"{path!r} is missing"
        case "json_invalid":  # the text is our own JSON, so it contains half a Unicode surrogate pair
            return f"a value cannot be used ({message.removeprefix('Invalid JSON: ')}); use plain YAML values"
        case "value_error":
            return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {json.dumps(error['input'])[:80]}"


def _keys_of(section: Sequence[str]) -> list[str]:
    """Return the keys of a recipe section, from the types of its fields."""
    kind: Any = Recipe
    for key in section:
        hint = get_type_hints(kind)[key]
        kind = next(part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part))
    return [field.name for field in dataclasses.fields(kind)]


def without_folders(text: str) -> str:
    """Cut an absolute path, also after a scheme (`local-dir:`), to its last part. Return other text and URLs unchanged."""
    if "://" in text:
        return text
    scheme, colon, path = text.rpartition(":")
    return f"{scheme}{colon}{Path(path).name}" if Path(path).is_absolute() else text


def _short(text: object) -> str:
    """Return text for a message as one line, truncated if it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_PROBLEM else f"{line[:_LONGEST_PROBLEM]}..."
