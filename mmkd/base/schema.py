"""What the models of recipes and cards have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

Spec = TypeVar("Spec", bound=BaseModel)


class Strict(BaseModel):
    """Keys that are not declared are refused, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


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
