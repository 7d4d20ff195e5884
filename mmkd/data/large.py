"""What is made of the rows of a large file: a sequence whose items are made when they are asked for.

A JSON list is read through once, which is when every row is tried; where its usable rows stand is kept on disk by the
content of the file. JSON lines are used at once: some rows, spread over the file, are tried.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import mmkd
from mmkd.base.bars import bar
from mmkd.base.cache_folder import cache_folder
from mmkd.base.distributed import claimed, is_main_process
from mmkd.data.annotations import Row
from mmkd.data.content import content_hash
from mmkd.data.lazy import Lazy
from mmkd.data.row_files import LargeFile, Unread, begins_list, large_lines, list_entries
from mmkd.data.tally import Tally
from mmkd.errors import DataError

logger = logging.getLogger(__name__)

TRIED = 20_000  # rows of large JSON lines


class Make:
    """From a row that is not read yet to an item."""

    def __init__(self, make: Callable[[Row], Any]):
        self.make = make

    def __call__(self, row: Unread) -> Any:
        return self.make(row())


def large_items(path: Path, names: dict[str, str], make: Callable[[Row], Any], tally: Tally, about: Any) -> Lazy[Any]:
    """The items of a large file. about: what they depend on beside the file and `make`. Raises DataError."""
    if begins_list(path):
        items = Lazy(_usable_entries(path, names, make, tally, about), Make(make))
        if items:
            items[0]  # where several places of pictures are possible, the first item settles it, in each process alike
        return items
    file = large_lines(path, names)
    places = sorted(random.Random(0).sample(range(len(file)), min(len(file), TRIED)))
    for place in places:
        _try(lambda place=place: file.row(place, tally.used), f"{path} line {file.numbers[place]}", make, tally)
    tally.of = len(file)
    return Lazy(file, Make(make))


def _try(row: Unread, where: str, make: Callable[[Row], Any], tally: Tally) -> bool:
    """Whether an item can be made of a row; counts it."""
    tally.rows += 1
    try:
        found = row()
        tally.keys.update(found.value.keys())
        item = make(found)
    except DataError as error:
        tally.drop(where, error)
        return False
    tally.items += 1
    tally.pictured += bool(item.images)
    return True


def _usable_entries(path: Path, names: dict[str, str], make: Callable[[Row], Any], tally: Tally, about: Any) -> LargeFile:
    """The rows of a list of which items can be made: from the folder of caches, else found now, by one process for all."""
    kind = getattr(make, "func", make)
    facts = json.dumps([content_hash(path), mmkd.__version__, kind.__module__, kind.__qualname__, names, about], sort_keys=True)
    key = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    kept = cache_folder() / "rows" / f"{key}.npz"
    try:
        with claimed(kept.with_suffix(".lock"), wait=True):
            if kept.exists():
                try:
                    return _load(kept, path, names, tally)
                except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                    logger.warning("%s is damaged (%s) and made anew", kept, error)
            starts, sizes, numbers, facts = _find(path, names, make, tally)
            _keep(kept, starts, sizes, numbers, facts)
    except OSError as error:
        logger.warning("%s: where its rows stand cannot be kept in %s (%s); it is read again next time", path, kept.parent, error)
        starts, sizes, numbers, _ = _find(path, names, make, tally)
    return LargeFile(path, starts, sizes, numbers, "entry", names)


def _find(
    path: Path, names: dict[str, str], make: Callable[[Row], Any], tally: Tally
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Starts, sizes and numbers of the usable rows, and the tally."""
    own = Tally()
    found = np.fromiter(_tried(path, names, make, own), dtype=np.dtype([("start", "i8"), ("size", "i4"), ("number", "i4")]))
    facts = asdict(own) | {"used": sorted(own.used), "keys": dict(own.keys)}
    _take(facts, tally)
    return found["start"], found["size"], found["number"], facts


def _tried(path: Path, names: dict[str, str], make: Callable[[Row], Any], tally: Tally) -> Iterator[tuple[int, int, int]]:
    size, quiet = path.stat().st_size, not is_main_process()
    with bar(size, f"reading {path.name} once", "byte", shown=not quiet, unit_scale=True) as told:
        for number, (start, length, value) in enumerate(list_entries(path)):
            where = f"{path} entry {number}"
            if _try(lambda value=value, where=where: Row(value, where, names, 0, tally.used), where, make, tally):
                yield start, length, number
            told.update(start + length - told.n)


def _keep(kept: Path, starts: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, facts: dict) -> None:
    partial = kept.with_suffix(f".{uuid.uuid4().hex[:8]}")
    with partial.open("wb") as stream:
        np.savez(stream, starts=starts, sizes=sizes, numbers=numbers, tally=np.array(json.dumps(facts)))
    partial.rename(kept)


def _load(kept: Path, path: Path, names: dict[str, str], tally: Tally) -> LargeFile:
    with np.load(kept) as found:
        _take(json.loads(str(found["tally"])), tally)
        return LargeFile(path, found["starts"], found["sizes"], found["numbers"], "entry", names)


def _take(facts: dict, tally: Tally) -> None:
    """Puts what was counted into a tally."""
    tally.rows, tally.dropped, tally.first = facts["rows"], facts["dropped"], facts["first"]
    tally.items, tally.pictured = facts["items"], facts["pictured"]
    tally.keys.clear()
    tally.keys.update(facts["keys"])
    tally.used.update(facts["used"])
