"""What the models of recipes and cards have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

Spec = TypeVar("Spec", bound=BaseModel)
LARGEST = 2**63 - 1  # whole numbers beyond it fit no tensor and no file format


class Strict(BaseModel):
    """Keys that are not declared are refused, and so are numbers that are not finite, at any depth of free mappings too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def numbers_are_usable(self) -> Strict:
        """Types say it of numbers that they name; here it is asked of what stands in free values, such as options of a term."""
        given = {**self.__dict__, **(self.model_extra or {})}
        wrong = [f"{path} is {_brief(number)}; {why}" for path, number in numbers_in(given) if (why := unusable(number))]
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self


def numbers_in(value: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in nested mappings and sequences with their dotted paths; models inside look after themselves."""
    if is_number(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from numbers_in(inner, f"{path}.{number}".lstrip("."))


def unusable(number: float) -> str:
    """Why no computation can use a number; "" for one that it can."""
    if isinstance(number, float):
        return "" if math.isfinite(number) else "give a finite number"
    return "" if -LARGEST <= number <= LARGEST else f"a whole number is at most {LARGEST}"


def _brief(number: float) -> str:
    return str(number) if isinstance(number, float) else f"about {'-' if number < 0 else ''}2^{number.bit_length() - 1}"


def is_default(default: Any) -> Callable[[Any], bool]:
    """Keys that came later are left out of a run's record at their default: records of earlier versions stay valid."""
    return lambda value: value == default


def one_of(spec: Spec, **ways: str) -> Spec:
    """The spec, if exactly one of these keys is given; `ways` says what each is. Raises ValueError."""
    if sum(getattr(spec, name) is not None for name in ways) != 1:
        named = [f"`{name}` ({what})" if what else f"`{name}`" for name, what in ways.items()]
        raise ValueError("give either " + " or ".join(named))
    return spec


def is_number(value: Any) -> bool:
    """Whether a value of YAML is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
