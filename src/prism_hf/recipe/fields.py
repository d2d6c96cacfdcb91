"""What the values of a recipe may be: numbers, names, ranges, and the checks that its sections share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


def _number_from_yaml(value: object) -> object:
    # YAML 1.1 reads `1e-3` (no dot) as a string; people write it all the same, so a float field accepts it.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(_number_from_yaml), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
MOST = 2**31 - 1  # the tables count in int32
MOST_IMAGES = 10**7  # a plan holds every one of them
Count = Annotated[int, Field(ge=1, le=MOST)]
AtLeastTwo = Annotated[int, Field(ge=2, le=MOST)]
Index = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch.manual_seed takes
Name = Annotated[str, Field(min_length=1)]
CropScale = tuple[Annotated[Float, Field(gt=0, le=1)], Annotated[Float, Field(gt=0, le=1)]]

STRICT = ConfigDict(strict=True, extra="forbid")


def check_order(key: str, pair: tuple[float, float]) -> None:
    """Refuse a range whose ends are swapped."""
    if pair[0] > pair[1]:
        raise ValueError(f"{key} must be [smallest, largest], got [{pair[0]}, {pair[1]}]; swap the two values")


def refuse_unused(section: object, names: Sequence[str], why: str) -> None:
    """Refuse values that nothing would read."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        if field.name in names and getattr(section, field.name) != _default(field):
            raise ValueError(f"{why}, so nothing reads {field.name}; leave it out")


def _default(field: dataclasses.Field[object]) -> object:
    default = field.default
    if isinstance(default, FieldInfo):
        return default.get_default(call_default_factory=True)
    return default
