"""YAML files that people write: recipes and cards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import DataError


class Loader(yaml.SafeLoader):
    """YAML with 1e-3 as the number that it is meant to be (YAML 1.1 asks for 1.0e-3), and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_mapping(path: Path, what: str, error: type[DataError] = DataError) -> dict[str, Any]:
    """The keys and values of a YAML file; `what` names such files in messages. Raises `error`, a kind of DataError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError as missing:
        raise error(f"there is no {what} {path}") from missing
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as unreadable:
        raise error(f"{path} is no valid YAML: {unreadable}") from unreadable
    if not isinstance(content, dict):
        held = "nothing" if content is None else type(content).__name__
        raise error(f"{path} holds {held}; a {what} is a mapping of keys to values")
    return content
