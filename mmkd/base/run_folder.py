"""A run's folder, which belongs to one recipe."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.distributed import is_main_process
from mmkd.base.files import write_whole
from mmkd.errors import DataError

RECIPE, FACTS = "recipe.yaml", "run.json"


def claim(folder: Path, recipe: Mapping[str, Any], *, title: str, seed: int) -> None:
    """Writes the resolved recipe into a run's folder, and title, seed and command beside it.

    Raises DataError, with the keys that differ, where the folder holds a run of another recipe.
    """
    path = folder / RECIPE
    if path.exists():
        differing = sorted(differences(yaml.safe_load(path.read_text(encoding="utf-8")), recipe))
        if differing:
            raise DataError(
                f"{folder} holds a run of another recipe (differs in {', '.join(differing[:5])}); set output=ANOTHER_FOLDER or "
                "remove it"
            )
        return
    if not is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    facts = {"title": title, "seed": seed, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted paths of the values that two nested mappings do not share."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in {*a, *b}:
            where = f"{path}.{key}" if path else str(key)
            found += differences(a[key], b[key], where) if key in a and key in b else [where]
        return found
    return [] if a == b else [path]
