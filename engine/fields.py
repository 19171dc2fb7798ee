"""The kinds of value that recipes are made of, each with the words in which it refuses another. Knows values; no recipe, no model."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

BITS = (2, 3, 4, 5, 6, 8)


class Strict(BaseModel):
    """Base of all recipe parts: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def whole_number(value: Any) -> Any:
    """Refuse 4.0, '4' and True where a whole number is meant: a silent conversion would hide a typing error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {value!r}")
    return value


def plain_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {value!r}")
    return value


def _ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {value!r}")
    if value == 1:
        raise ValueError(f"{value!r} would leave nothing of a matrix; use at most 0.99, or drop the block under `structure`")
    return value


def _width(value: Any) -> Any:
    if isinstance(value, bool) or value not in BITS or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a width that a format has; choose one of {', '.join(map(str, BITS))}")
    return value


def _group(value: Any) -> Any:
    if value == "row":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or 8 <= value <= 65536):
        raise ValueError(f"{value!r} is not a group size; give a number from 8, or 'row' for one group a row")
    return value


def _rank(value: Any) -> Any:
    if whole_number(value) < 1:
        raise ValueError(f"{value} is no rank: a factored matrix keeps at least 1; to take a block out use `structure`")
    return value


Whole = Annotated[int, BeforeValidator(whole_number)]
Keep = Annotated[float, Field(gt=0.0, le=1.0), BeforeValidator(plain_number)]
Bits = Annotated[int, BeforeValidator(_width)]
GroupSize = Annotated[int, BeforeValidator(_group)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_ratio)]
Rank = Annotated[int, BeforeValidator(_rank)]
