"""JSON lines that grow while a program runs: a killed one leaves whole lines, and at most one torn line behind them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmkd.errors import DataError, one_line

logger = logging.getLogger(__name__)


def read_object(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file that mmkd wrote. Raises DataError, on one line, for a file that holds none."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; write it again or delete it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {_kind(content)}, an object is expected; write it again or delete it")
    return content


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def log_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a training's log, each with `stage` and `step`. What is none is named in the log and left out; the last line
    of a killed run may be cut short. Raises DataError for a file that is no text."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no log of a training: {one_line(error)}; delete it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["stage"], str) or isinstance(row["step"], bool) or not math.isfinite(row["step"]):
                raise ValueError("odd stage or step")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            logger.warning("%s, line %d is left out: it is no row of a log (%s)", path, number, one_line(error, 80))
            continue
        yield row


class JsonLines:
    """A file of one JSON value a line, to which rows are appended.

    errors: what becomes of characters that UTF-8 cannot hold, as in `open`. durable: whether `append` returns only when the
    lines are on the disk.
    """

    def __init__(self, path: Path, *, errors: str = "strict", durable: bool = False):
        self.path, self._errors, self._durable = path, errors, durable

    def whole(self) -> bytes:
        """The content up to the last line break; nothing where there is no file. Another process may be writing on."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def rows(self) -> list[Any]:
        """The values of all whole lines. Raises ValueError for one that is no JSON."""
        return [json.loads(line) for line in self.whole().split(b"\n") if line]

    def drop_torn_line(self) -> None:
        """Takes away a last line without its end; what is appended next would stand on it."""
        whole = len(self.whole())
        if self.path.exists() and whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def append(self, rows: Iterable[Any]) -> None:
        """Writes the rows behind what is there, in one go."""
        with self.path.open("a", encoding="utf-8", errors=self._errors, newline="\n") as stream:
            stream.write(lines_of(rows))
            if self._durable:
                stream.flush()
                os.fsync(stream.fileno())


def lines_of(rows: Iterable[Any]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
