"""Read JSON files of others into pydantic classes; one line says which key is wrong, and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .untrusted import visible

M = TypeVar("M", bound=BaseModel)
_LONGEST_VALUE = 80


def read_typed(path: Path, kind: type[M]) -> M:
    """Read a JSON file.

    Args:
        path: The file.
        kind: What it has to hold; the `description` of a field says in errors what was expected.

    Raises:
        ValueError: It is something else; one line that names file and key.
        OSError: It cannot be read.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error, kind)}") from error


def first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """Say in one line which key is wrong, what it holds and what was expected."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or "[" not in part)
    field = kind.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    expected = field.description if field and field.description else first["msg"].removeprefix("Value error, ")
    if not key:
        text = expected
    elif first["type"] == "missing":
        text = f"{key} is missing; expected {expected}"
    else:
        text = f"{key} is {repr(first['input'])[:_LONGEST_VALUE]}; expected {expected}"
    return visible(" ".join(text.split()))
