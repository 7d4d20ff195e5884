"""JSON lines that grow while a program runs: a killed one leaves whole lines, and at most one torn line behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
