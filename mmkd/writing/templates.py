"""Templates of prompts and rows: Jinja in its sandbox. Data are values in them, never templates themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmkd.errors import DataError, one_line

LONGEST = 2**18  # characters that a template may make

_SANDBOX = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
)


@lru_cache(maxsize=256)
def compiled(text: str) -> Template:
    """A template. Raises ValueError for one that is none."""
    try:
        return _SANDBOX.from_string(text)
    except TemplateError as error:
        raise ValueError(f"{text[:60]!r} is no template: {one_line(error)}") from error


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A template with these values, without white space around it. Raises DataError for values that are not there."""
    try:
        made = compiled(text).render(values).strip()
    except (
        TemplateError,
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(f"the template {text[:60]!r} cannot be filled: {one_line(error, 200)}") from error
    if len(made) > LONGEST:
        raise DataError(f"the template {text[:60]!r} makes {len(made):,} characters, over {LONGEST:,}")
    return made
