"""What the keys of a spec are made of: a section, sizes, the forms of names, a value as a refusal shows it."""

from __future__ import annotations

import math
from datetime import date, time
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

MAX_INT32 = (1 << 31) - 1
MAX_LAYERS = 10_000

NAME = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
RULES = {
    NAME: "lower-case letters, digits and inner dashes, a letter first, at most 40",
    DNS_LABEL: "lower-case letters, digits and inner dashes, at most 63 characters (a DNS label)",
}


class Section(BaseModel):
    """Keys that belong together; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """True is no number, though it counts as 1 in Python; -0.0 is 0.0: a run's name is of the bytes."""
        if isinstance(value, bool):
            wanted = cls.model_fields[str(info.field_name)].annotation
            if float in (wanted, *get_args(wanted)):
                raise PydanticKnownError("float_type")
        return 0.0 if isinstance(value, float) and value == 0 else value


def _as_quantity(value: Any) -> Any:
    """Numbers of a table as the text that they are, as in a pod's YAML."""
    if not isinstance(value, dict):
        return value
    number = {key: isinstance(item, int | float) and not isinstance(item, bool) for key, item in value.items()}
    return {key: str(item) if number[key] else item for key, item in value.items()}


Quantities = Annotated[dict[str, str], BeforeValidator(_as_quantity)]
"""Kubernetes quantities by resource: "500m", "16Gi", 2."""


def size(default: Any = ..., *, low: int = 1, high: int = MAX_INT32, text: str) -> Any:
    """A whole number from ``low`` to ``high``."""
    return Field(default, ge=low, le=high, description=text, strict=True)


def divisors(number: int) -> list[int]:
    """All divisors, in the time of its square root: a wrong number must not take minutes to refuse."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return [*small, *(number // d for d in small)]


def power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def largest_two(number: int) -> int:
    """The largest power of two that divides a number above 0."""
    return number & -number


def shown(value: Any) -> str:
    """A value as a refusal repeats it: not longer than a line or two."""
    if isinstance(value, date | time):
        return f"{value} (a date or time)"
    if isinstance(value, int) and value.bit_length() > 400:
        return f"(a number of {value.bit_length()} bits)"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # it holds such a number, or is nested without end
        text = f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"
