"""YAML files that people write: recipes and cards. Plain values only, and no more of them than people write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import DataError, one_line

MAX_BYTES = 2**18  # of a file
MAX_DEPTH = 40  # of mappings and lists within one another
MAX_VALUES = 100_000  # keys and values, what aliases stand for counted each time
MAX_DIGITS = 400  # of a number


class Loader(yaml.SafeLoader):
    """YAML with 1e-3 as the number that it is meant to be (YAML 1.1 asks for 1.0e-3), dates as the text that they are, no key
    given twice, and bounds on depth and size."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {}, 0)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} mappings and lists within one another", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"))
        twice = sorted(key for key, count in keys.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _refused("a character that no text holds (NUL or half a surrogate pair)", node)
        if len(value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
            raise _refused(f"a number of {len(value):,} digits", node)
        return value

    @classmethod
    def add_number(cls, pattern: str) -> None:
        cls.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(pattern), list("-+.0123456789"))


Loader.add_number(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for letter, found in Loader.yaml_implicit_resolvers.items()
}


def _refused(what: str, where: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"there is {what}", where.start_mark)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from part if isinstance(part, tuple) else (part,)


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Values below a node, what aliases stand for counted each time. Raises YAMLError beyond the bounds, and for a value that
    holds itself."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise _refused("a value that holds itself", node)
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise _refused(f"more than {MAX_DEPTH} mappings and lists within one another", node)
    known[id(node)] = 0
    count = 1
    for child in _children(node):
        count += _expanded(child, known, depth + 1)
        if count > MAX_VALUES:
            raise _refused(f"more than {MAX_VALUES:,} values, aliases counted each time", node)
    known[id(node)] = count
    return count


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError that says on one line what is wrong."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES:,} characters")
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, KeyError, RecursionError) as error:
        raise ValueError(_told(error)) from error


def _told(error: Exception) -> str:
    """What is wrong and where, without the lines that the library copies from the text."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return one_line(error) or type(error).__name__
    context = f"{error.context}, " if getattr(error, "context", None) else ""
    return f"{one_line(context + problem)}, line {mark.line + 1}, column {mark.column + 1}"


_parsed = lru_cache(maxsize=64)(parse)  # a run reads the same few cards again and again


def read_mapping(path: Path, what: str, error: type[DataError] = DataError) -> dict[str, Any]:
    """The keys and values of a YAML file; `what` names such files in messages. Raises `error`, a kind of DataError."""
    shown = one_line(path, 200)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{shown} is no valid YAML: it is no file")
        with path.open("rb") as file:
            content = deepcopy(_parsed(file.read(MAX_BYTES + 1).decode("utf-8")))
    except FileNotFoundError as missing:
        raise error(f"there is no {what} {shown}") from missing
    except error:
        raise
    except OSError as unreadable:
        raise error(f"{shown} cannot be read: {unreadable.strerror or one_line(unreadable)}") from unreadable
    except ValueError as unreadable:
        raise error(f"{shown} is no valid YAML: {one_line(unreadable)}") from unreadable
    if not isinstance(content, dict):
        held = "nothing" if content is None else type(content).__name__
        raise error(f"{shown} holds {held}; a {what} is a mapping of keys to values")
    return content
