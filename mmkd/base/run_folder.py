"""A run's folder, which belongs to one recipe."""

from __future__ import annotations

import datetime as dt
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
UNTRAINED = (RECIPE, FACTS, ".lock", "upcycle.json")  # files of a run in which nothing was trained yet


def claim(
    folder: Path, recipe: Mapping[str, Any], *, title: str, seed: int, data: Mapping[str, Any] | None = None
) -> None:
    """Writes the resolved recipe into a run's folder, and title, seed, command, day and the hashes of its data beside it.

    data: by stage, what tells that its files are still the same. A folder in which nothing was trained yet may be taken by
    another recipe. Raises DataError, with what differs, where it holds a run of another recipe or of other data.
    """
    path = folder / RECIPE
    if path.exists() and _has_begun(folder):
        differing = sorted(differences(yaml.safe_load(path.read_text(encoding="utf-8")), recipe))
        if differing:
            raise DataError(
                f"{folder} holds a run of another recipe (differs in {', '.join(differing[:5])}); set output=ANOTHER_FOLDER or "
                "remove it"
            )
        _refuse_other_data(folder, data)
        return
    if not is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    facts = {"title": title, "seed": seed, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    facts |= {"date": dt.date.today().isoformat()} | ({"data": data} if data is not None else {})
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def day_of(folder: Path) -> dt.date:
    """The day on which a run was begun, as it is recorded; today where it is not."""
    path = folder / FACTS
    recorded = json.loads(path.read_text(encoding="utf-8")).get("date") if path.exists() else None
    return dt.date.fromisoformat(recorded) if recorded else dt.date.today()


def _has_begun(folder: Path) -> bool:
    """Whether anything stands in a run's folder beside what a claim and the preparation of a stage write."""
    return any(path.name not in UNTRAINED for path in folder.rglob("*") if path.is_file())


def _refuse_other_data(folder: Path, data: Mapping[str, Any] | None) -> None:
    path = folder / FACTS
    recorded = json.loads(path.read_text(encoding="utf-8")).get("data") if path.exists() else None
    if recorded is None or data is None:  # a run of an earlier version
        return
    differing = sorted(differences(recorded, json.loads(json.dumps(data))))
    if differing:
        raise DataError(
            f"{folder} holds a run of other data (differs in {', '.join(differing[:5])}): files changed since it began; put them "
            "back, set output=ANOTHER_FOLDER, or remove the folder to start anew"
        )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted paths of the values that two nested mappings do not share."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in {*a, *b}:
            where = f"{path}.{key}" if path else str(key)
            found += differences(a[key], b[key], where) if key in a and key in b else [where]
        return found
    return [] if a == b else [path]
