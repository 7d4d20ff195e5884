"""Annotation files: JSON and JSON lines whose fields are checked as they are asked for.

Whatever is wrong with a file is a DataError that names the file, the row and the key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.errors import DataError


def kind(value: Any) -> str:
    """A value's JSON type in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: on one line, and short however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: Exception) -> str:
    """An error's own words on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


class Row:
    """An annotation with its place; its fields are checked when they are asked for.

    `names` says under which key the file has a field, where that is not the field's own name. `number` is its place among the
    rows of its file. Keys that are asked for are added to `used`.
    """

    def __init__(
        self, value: Any, where: str, names: Mapping[str, str] | None = None, number: int = 0, used: set[str] | None = None
    ) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where}: {kind(value)} where an object is expected")
        self.value, self.where, self.names, self.number, self.used = value, where, names or {}, number, used

    def _key(self, key: str) -> str:
        key = self.names.get(key, key)
        if self.used is not None:
            self.used.add(key)
        return key

    def has(self, key: str) -> bool:
        return self.value.get(self._key(key)) is not None

    def get(self, key: str) -> Any:
        key = self._key(key)
        if key not in self.value:
            there = ", ".join(map(shown, list(self.value)[:12])) or "none"
            raise DataError(f"{self.where}: key {key!r} is missing; keys there: {there}")
        return self.value[key]

    def wrong(self, key: str, wanted: str) -> DataError:
        key = self.names.get(key, key)
        value = self.value[key]
        return DataError(f"{self.where}: key {key!r} is {kind(value)} ({shown(value)}), {wanted} is expected")

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        value = self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def identifier(self, key: str, default: str | None = None) -> str:
        """A string or a whole number, as a string."""
        if default is not None and not self.has(key):
            return default
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.wrong(key, "a string or a whole number")
        return str(value)

    def integer(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        return value

    def list_of(self, key: str, wanted: type, words: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, f"a list of {words}")
        for place, entry in enumerate(value):
            if not isinstance(entry, wanted) or isinstance(entry, bool):
                raise DataError(
                    f"{self.where}: entry {place} of {key!r} is {kind(entry)} in a list of {words}"
                )
        return value

    def texts(self, key: str) -> list[str]:
        return self.list_of(key, str, "strings")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(repeated)} is there twice in one object")
    return value


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)


def parse(text: str, where: str) -> Any:
    """The value of a JSON text; `where` it stands is named in the DataError for what is none."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        end = " (the end: is the file complete?)" if error.pos >= len(text.rstrip()) else ""
        place = f"line {error.lineno} column {error.colno}"
        raise DataError(f"{where} is no valid JSON: {error.msg} at {place}{end}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no valid JSON: {one_line(error)}") from error


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8 with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def load(path: Path) -> Any:
    """The value of a JSON file."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; is the download complete?")
    return parse(text, str(path))


def load_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file."""
    value = load(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {kind(value)}, an object is expected")
    return value


def as_list(path: Path, value: Any, what: str = "") -> list[Any]:
    """`value` of a file if it is a list; ` what` it is follows its type in the error."""
    if not isinstance(value, list):
        raise DataError(f"{path} holds {kind(value)}{what}, a list is expected")
    return value
