"""A run's folder, which belongs to one recipe."""

from __future__ import annotations

import datetime as dt
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.checksums import same_sums
from mmkd.base.distributed import is_main_process, world_size
from mmkd.base.files import copy_whole, remove, write_whole
from mmkd.base.jsonl import read_object
from mmkd.base.yaml_files import read_mapping
from mmkd.errors import DataError, one_line

logger = logging.getLogger(__name__)

RECIPE, FACTS = "recipe.yaml", "run.json"
EVENTS = "tensorboard"  # what TensorBoard reads, a folder a role and stage
SKIPPED = "_skipped.jsonl"  # ending of the files in log/ that name the samples that were left out; the others are logs
UNTRAINED = (RECIPE, FACTS, ".lock", "upcycle.json")  # files of a run in which nothing was trained yet


def claim(
    folder: Path, recipe: Mapping[str, Any], *, title: str, seed: int, data: Mapping[str, Any] | None = None,
    changeable: Sequence[str] = (),
) -> None:  # fmt: skip
    """Writes the resolved recipe into a run's folder, and title, seed, command, day and the hashes of its data beside it.

    data: by stage, what tells that its files are still the same.  changeable: patterns of keys that a run may go on with other
    values of; what was changed is logged and recorded. A folder in which nothing was trained yet may be taken by another recipe.
    Raises DataError, with what differs, where it holds a run of another recipe or of other data.
    """
    path = folder / RECIPE
    if path.exists() and _has_begun(folder):
        recorded = _recorded(path)
        found = sorted(differences(recorded, recipe))
        changed = [key for key in found if any(fnmatch(key, pattern) for pattern in changeable)]
        differing = [key for key in found if key not in changed]
        if differing:
            raise DataError(
                f"{folder} holds a run of another recipe (differs in {', '.join(differing[:5])}); set output=ANOTHER_FOLDER, or "
                "start anew in it with --restart"
            )
        _refuse_other_data(folder, data)
        if is_main_process():
            logger.info("%s holds a run of this recipe: going on from what is there", folder)
            for key in changed:
                logger.info("from here on %s is %s; it was %s", key, value_at(recipe, key), value_at(recorded, key))
            if changed:
                write_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
        return
    if not is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    facts = {"title": title, "seed": seed, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    facts |= {"date": dt.date.today().isoformat()} | ({"data": data} if data is not None else {})
    write_whole(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def restart(folder: Path) -> None:
    """Deletes what a run left in its folder, for one that starts anew. Raises DataError for a folder that is no run's."""
    if is_main_process() and folder.is_dir():
        there = [path for path in folder.iterdir() if path.name not in UNTRAINED]
        if there and not (folder / RECIPE).exists():
            raise DataError(f"{folder} holds no run but {one_line(there[0].name, 80)}; nothing of it is deleted")
        if there:
            logger.info("starting anew: deleting the run in %s", folder)
        for path in [*there, folder / RECIPE, folder / FACTS]:  # the recipe last: until then the folder is known as a run's
            remove(path)
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # nobody reads what is being deleted


def take_control(shared: Path, run: Path, role: str) -> None:
    """Copies a control and its log into a run, under its role. Another one that is there goes with its log: the two never mix."""
    own, logs = run / role, run / "log"
    if own.exists() and not same_sums(shared / "control", own):
        remove(own)
    if not own.exists():
        copy_whole(shared / "control", own)
    logs.mkdir(parents=True, exist_ok=True)
    for ending in (".jsonl", SKIPPED):
        log = shared / "log" / f"control{ending}"
        if log.exists():
            write_whole(logs / f"{role}{ending}", log.read_text(encoding="utf-8"))
        elif (logs / f"{role}{ending}").exists():
            remove(logs / f"{role}{ending}")
    events, mine = shared / EVENTS / "control", run / EVENTS / role
    if mine.exists():
        remove(mine)
    if events.exists():
        copy_whole(events, mine)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path, "run's recipe")
    except DataError as error:
        raise DataError(f"{error}; {path.parent} is damaged: start anew in it with --restart, or take another folder") from error


def day_of(folder: Path) -> dt.date:
    """The day on which a run was begun, as it is recorded; today where it is not."""
    path = folder / FACTS
    recorded = read_object(path).get("date") if path.exists() else None
    try:
        return dt.date.fromisoformat(recorded) if recorded else dt.date.today()
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has the date {recorded!r}, which is none; write the day on which the run was begun") from error


def _has_begun(folder: Path) -> bool:
    """Whether anything stands in a run's folder beside what a claim and the preparation of a stage write."""
    written = (path.name for path in folder.rglob("*") if path.is_file())
    return any(name not in UNTRAINED and not name.endswith(SKIPPED) for name in written)


def _refuse_other_data(folder: Path, data: Mapping[str, Any] | None) -> None:
    path = folder / FACTS
    recorded = read_object(path).get("data") if path.exists() else None
    if recorded is None or data is None:  # a run of an earlier version
        return
    differing = sorted(differences(recorded, json.loads(json.dumps(data))))
    if differing:
        raise DataError(
            f"{folder} holds a run of other data (differs in {', '.join(differing[:5])}): files changed since it began; put them "
            "back, set output=ANOTHER_FOLDER, or start anew with --restart"
        )


def value_at(content: Mapping[str, Any], key: str) -> str:
    """The value of a dotted key for a message; "its default" where it is not written down."""
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return "its default"
        value = value[part]
    return one_line(str(value), 80)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted paths of the values that two nested mappings do not share."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in {*a, *b}:
            where = f"{path}.{key}" if path else str(key)
            found += differences(a[key], b[key], where) if key in a and key in b else [where]
        return found
    return [] if a == b else [path]
