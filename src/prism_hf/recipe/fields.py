"""What the values of a recipe may be: numbers, names, ranges, and the checks that its sections share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import ConfigDict, Field

Float = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[Float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[Float, Field(gt=0, le=1)]
MOST = 2**31 - 1  # the tables count in int32
MOST_IMAGES = 10**7  # a plan holds every one of them
Count = Annotated[int, Field(ge=1, le=MOST)]
AtLeastTwo = Annotated[int, Field(ge=2, le=MOST)]
Index = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch.manual_seed takes
Name = Annotated[str, Field(min_length=1)]
CropScale = tuple[PositiveFraction, PositiveFraction]

STRICT = ConfigDict(strict=True, extra="forbid")


def check_order(key: str, pair: tuple[float, float]) -> None:
    """Refuse a range whose ends are swapped."""
    if pair[0] > pair[1]:
        raise ValueError(f"{key} must be [smallest, largest], got [{pair[0]}, {pair[1]}]; swap the two values")


def refuse_unused(section: Any, names: Iterable[str], why: str) -> None:
    """Refuse values that nothing would read."""
    for name in names:
        default = type(section).__pydantic_fields__[name].get_default(call_default_factory=True)
        if getattr(section, name) != default:
            raise ValueError(f"{why}, so nothing reads {name}; leave it out")
