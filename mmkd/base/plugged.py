"""How recipes and cards name something of the registry with its options: `{kind: NAME, option: value}`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator

from mmkd.base.schema import Strict
from mmkd.errors import did_you_mean
from mmkd.registry import options_of, registry


class Plugged(Strict):
    """A dataclass of one kind of the registry by name; its fields are the options. Unknown names and options are refused.

    `NAME` and `{NAME: {options}}` are short for `{kind: NAME, options}`.
    """

    model_config = ConfigDict(extra="allow")  # the options of the kind: fields of its class
    of: ClassVar[str]  # the kind in the registry
    one: ClassVar[str]  # what one of them is called

    kind: str  # a name of `mmkd list` of its kind

    @model_validator(mode="before")
    @classmethod
    def from_short_form(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"kind": given}
        if isinstance(given, dict) and "kind" not in given and len(given) == 1:
            ((name, options),) = given.items()
            if options is None or isinstance(options, dict):
                return {"kind": name, **(options or {})}
        return given

    @model_validator(mode="after")
    def known(self) -> Plugged:
        known, given = registry(self.of), self.model_extra or {}
        if self.kind not in known:
            raise ValueError(f"there is no {self.one} {self.kind!r}; {did_you_mean(self.kind, known)}")
        found = known.get(self.kind)
        wrong = [name for name in given if name not in options_of(found)]
        if wrong:
            raise ValueError(f"{self.kind} has no option {wrong[0]!r}; {did_you_mean(wrong[0], options_of(found))}")
        try:
            TypeAdapter(found).validate_python(given)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, e['loc'])) or self.kind}: {_words(e)}" for e in error.errors()]
            raise ValueError("; and ".join(told)) from error
        return self

    def made(self) -> Any:
        """The object that this describes, each time a new one."""
        return TypeAdapter(registry(self.of).get(self.kind)).validate_python(self.model_extra or {})


def _words(error: Any) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{error['msg']}, got {error['input']!r}"
