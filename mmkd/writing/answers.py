"""Answers that are kept as they come: each process appends to a file of its own, and all read all files."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmkd.base.jsonl import lines_of
from mmkd.errors import DataError, one_line

SYNC = 1.0  # seconds of answers that the machine's own end may lose; that of the process loses none


class KeptAnswers:
    """Rows with a `key` in the files of one folder. What is known of each is where it stands, not what it says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> file's number, offset
        self._files: list[Path] = []
        self._read: dict[Path, int] = {}  # bytes that were looked at
        self._own: Any = None
        self._synced = 0.0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Looks for what this and other processes have added. Raises DataError for a damaged line."""
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else ():
            start = self._read.setdefault(path, 0)
            if path.stat().st_size <= start:
                continue
            if path not in self._files:
                self._files.append(path)
            self._scan(path, self._files.index(path), start)

    def _scan(self, path: Path, number: int, offset: int) -> None:
        with path.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):  # being written, or torn by a kill
                    break
                key = _row(path, line)["key"]
                self._places.setdefault(bytes.fromhex(key), (number, offset))
                offset += len(line)
        self._read[path] = offset

    def get(self, key: str) -> dict[str, Any] | None:
        """A row; None where there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        path = self._files[place[0]]
        with path.open("rb") as stream:
            stream.seek(place[1])
            return _row(path, stream.readline())

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row to this process's file, at once."""
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            self._own = (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._own.write(lines_of([row]))
        self._own.flush()
        if time.monotonic() - self._synced > SYNC:
            self.sync()

    def sync(self) -> None:
        """Returns when what was added is on the disk."""
        if self._own is not None:
            os.fsync(self._own.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._own is not None:
            self.sync()
            self._own.close()
            self._own = None

    @contextmanager
    def open(self) -> Iterator[KeptAnswers]:
        """Closes this process's file at the end."""
        try:
            yield self
        finally:
            self.close()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of some keys that have no row."""
        return [key for key in keys if key not in self]


def _row(path: Path, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        bytes.fromhex(row["key"])
        return row
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} has a line that is no answer ({one_line(error, 80)}); delete the file, its answers are asked again"
        ) from error
