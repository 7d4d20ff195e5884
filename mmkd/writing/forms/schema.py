"""Answers in JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mmkd.data.samples import Question
from mmkd.errors import did_you_mean
from mmkd.registry import register
from mmkd.writing.forms import Form, FormError

_TYPES: dict[str, Any] = {"text": str, "number": float, "integer": int, "truth": bool}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
LONGEST = 2**16  # characters of JSON that are read


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@register("forms", "json")
@dataclass(frozen=True)
class Json(Form):
    """One JSON object with these `fields`: text, number, integer, truth, a list of allowed values, or [TYPE] for a list of them.

    A name that ends in "?" may be missing. Keys that are not named, other types, empty texts, repeated keys and anything around
    the object but one code fence are refused.
    """

    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("fields: name at least one, such as {answer: text}")
        _ = self._model

    def read(self, text: str, question: Question) -> dict[str, Any]:
        if len(text) > LONGEST:
            raise FormError("is too long for JSON")
        fenced = _FENCE.fullmatch(text)
        try:
            value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise FormError("is no JSON") from None
        if not isinstance(value, dict):
            raise FormError("is JSON, but no object")
        try:
            found = self._model.model_validate(value).model_dump(exclude_none=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = str(first["loc"][0]) if first["loc"] and str(first["loc"][0]) in self.keys() else "another key"
            raise FormError(f"does not fit the schema ({key}: {first['type']})") from None
        empty = next((name for name, inner in found.items() if _is_empty(inner)), None)
        if empty is not None:
            raise FormError(f"does not fit the schema ({empty}: empty)")
        return found

    def keys(self) -> tuple[str, ...]:
        return tuple(name.removesuffix("?") for name in self.fields)

    @cached_property
    def _model(self) -> type[BaseModel]:
        made = {}
        for name, kind in self.fields.items():
            key = name.removesuffix("?")
            if not key.isidentifier() or key.startswith("_"):
                raise ValueError(f"fields: {name!r} is no name; use letters, digits and _")
            made[key] = (_type(name, kind) | None, None) if name.endswith("?") else (_type(name, kind), ...)
        return create_model("Answer", __base__=_Exact, **made)


def _type(name: str, kind: Any) -> Any:
    if isinstance(kind, str) and kind in _TYPES:
        return _TYPES[kind]
    if isinstance(kind, list) and len(kind) == 1 and isinstance(kind[0], str) and kind[0] in _TYPES:
        return list[_TYPES[kind[0]]]  # type: ignore[misc]
    if isinstance(kind, list) and len(kind) > 1 and all(isinstance(value, str) for value in kind):
        return Literal[tuple(kind)]  # type: ignore[valid-type]
    told = did_you_mean(kind, _TYPES) if isinstance(kind, str) else f"there are {', '.join(_TYPES)}"
    raise ValueError(f"fields.{name}: {kind!r} is no type; {told}, [TYPE] for a list of them, or a list of allowed values")


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return not value or any(map(_is_empty, value))
    return isinstance(value, str) and not value.strip()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key repeats")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(name)
