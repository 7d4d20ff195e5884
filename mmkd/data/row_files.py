"""Files of rows: JSON lists and JSON lines. Small ones are read at once, of large ones the rows are read when they are asked for.

Of a large file only the places of its rows are kept, so that any number of processes has it for nothing. Lines are found by their
breaks. A list is read through once, in pieces, and what was found is kept in a folder of caches, by the content of the file.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from mmkd.data.annotations import DECODER, Row, as_list, parse, read_text
from mmkd.errors import DataError

LARGE = 64 * 2**20  # bytes from which a file's rows are read when they are asked for
_BLOCK = 4 * 2**20
_LONGEST = 2**28  # bytes of one entry

Unread = Callable[[], Row]  # gives a row; raises DataError for one that is none


def is_large(path: Path) -> bool:
    return path.is_file() and path.stat().st_size >= LARGE


def unread_rows(path: Path, names: Mapping[str, str] | None = None, used: set[str] | None = None) -> Sequence[Unread]:
    """The rows of a small JSON list or of JSON lines, whatever the file is called; the lines are not parsed yet.

    `names`, `used`: as in `Row`. Raises DataError for a file that cannot be read, and a list that is not whole.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; is the download complete?")
    if text.lstrip().startswith("["):
        values = as_list(path, parse(text, str(path)))
        return [partial(Row, value, f"{path} entry {n}", names, n, used) for n, value in enumerate(values)]
    # Not splitlines(): it also splits at characters that JSON strings may hold.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [partial(_row_of_line, line, f"{path} line {number}", names, n, used) for n, (number, line) in enumerate(lines)]


def _row_of_line(line: str, where: str, names: Mapping[str, str] | None, number: int, used: set[str] | None) -> Row:
    return Row(parse(line, where), where, names, number, used)


class LargeFile(Sequence[Unread]):
    """The rows of a large file. starts, sizes: of each row in bytes.  numbers: of its line or entry."""

    def __init__(
        self, path: Path, starts: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, word: str,
        names: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.path, self.starts, self.sizes, self.numbers, self.word, self.names = path, starts, sizes, numbers, word, names
        self._opened: tuple[int, int] | None = None  # (process, file)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Unread: ...
    @overload
    def __getitem__(self, index: slice) -> LargeFile: ...
    def __getitem__(self, index: int | slice) -> Unread | LargeFile:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        return partial(self.row, range(len(self))[index])

    def taken(self, places: np.ndarray) -> LargeFile:
        """Those at some places."""
        parts = (self.starts[places], self.sizes[places], self.numbers[places])
        return LargeFile(self.path, *parts, self.word, self.names)

    def row(self, index: int, used: set[str] | None = None) -> Row:
        """Raises DataError for what is no row."""
        where = f"{self.path} {self.word} {self.numbers[index]}"
        text = os.pread(self._file(), int(self.sizes[index]), int(self.starts[index]))
        try:
            value = parse(text.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not in UTF-8 (byte {error.start}); convert it to UTF-8") from error
        number = int(self.numbers[index]) - (self.word == "line")
        return Row(value, where, self.names, number, used)

    def _file(self) -> int:
        """Opened by each process for itself. Reading at a place leaves no page of the file in the process's memory."""
        process = os.getpid()
        if self._opened is None or self._opened[0] != process:
            self._opened = (process, os.open(self.path, os.O_RDONLY))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


def large_lines(path: Path, names: Mapping[str, str] | None = None) -> LargeFile:
    """The rows of a large file of JSON lines, found by their breaks."""
    breaks = [np.array([-1], dtype=np.int64)]
    done = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            breaks.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + done)
            done += len(block)
    ends = np.concatenate([*breaks, [done]])
    starts, sizes = ends[:-1] + 1, np.diff(ends) - 1
    kept = np.flatnonzero(sizes > 1)  # an empty line may hold a carriage return
    with path.open("rb") as stream:
        mark = stream.read(3) == codecs.BOM_UTF8
    starts[0] += 3 * mark
    sizes[0] -= 3 * mark
    return LargeFile(path, starts[kept], sizes[kept].astype(np.int32), (kept + 1).astype(np.int32), "line", names)


def begins_list(path: Path) -> bool:
    """Whether a file holds a JSON list."""
    with path.open("rb") as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


class _Pieces:
    """A text file read in pieces. text, place: what is at hand, and where in it one stands.  at: that in bytes of the file."""

    def __init__(self, path: Path, stream: BinaryIO):
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False
        self.at = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(0)

    def more(self) -> None:
        """Reads on: at least as much as is at hand, so that one long entry is not tried too often."""
        self.text, self.place = self.text[self.place :], 0
        block = self._stream.read(max(_BLOCK, len(self.text)))
        self.ended = not block
        try:
            self.text += self._decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path} is not in UTF-8 behind byte {self.at}; convert it to UTF-8") from error

    def forward(self, place: int) -> int:
        """Goes on to a place of the text; the bytes between."""
        piece = self.text[self.place : place]
        size = len(piece) if piece.isascii() else len(piece.encode())
        self.place, self.at = place, self.at + size
        return size

    def skip(self, characters: str) -> str:
        """Goes on to the next character that is none of these; "" at the end of the file."""
        while True:
            match = re.compile(f"[{re.escape(characters)}]*").match(self.text, self.place)
            self.forward(match.end())
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()


def list_entries(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(start, size in bytes, value) of each entry of a large JSON list, read in pieces. Raises DataError."""
    with path.open("rb") as stream:
        pieces = _Pieces(path, stream)
        pieces.skip(" \t\r\n")
        pieces.forward(pieces.place + 1)
        number = 0
        while (found := pieces.skip(" \t\r\n,")) != "]":
            if not found:
                raise DataError(f"{path} is no valid JSON: it ends behind entry {number - 1}; is the download complete?")
            try:
                value, end = DECODER.raw_decode(pieces.text, pieces.place)
            except (ValueError, RecursionError) as error:
                if pieces.ended or len(pieces.text) - pieces.place > _LONGEST:
                    raise DataError(f"{path} entry {number} is no valid JSON: {error}; is the file complete?") from error
                pieces.more()
                continue
            if end == len(pieces.text) and not pieces.ended:  # a number may go on
                pieces.more()
                continue
            start = pieces.at
            yield start, pieces.forward(end), value
            number += 1
