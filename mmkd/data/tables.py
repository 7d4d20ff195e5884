"""Tables that carry their pictures with them: tab-separated text with base64 cells, and parquet files.

A picture is named "ROW/COLUMN", rows counted from 0 without the header. Both readers raise ValueError or OSError.
"""

from __future__ import annotations

import base64
import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

# A cell may be a whole picture in base64; csv refuses more than 128 KiB unless it is told otherwise.
MAX_CELL = 2**27


def picture_of_cell(path: Path, name: str) -> bytes:
    """The encoded picture in the cell `name` of the .tsv or .parquet file `path`."""
    row, _, column = name.partition("/")
    table = tsv_rows(path) if path.suffix == ".tsv" else parquet_rows(path)
    if not row.isdecimal() or int(row) >= len(table):
        raise ValueError(f"there is no row {row!r} among {len(table)}")
    value = table[int(row)].get(column)
    if isinstance(value, dict):  # how Hugging Face's data sets store pictures
        value = value.get("bytes")
    if isinstance(value, str):
        return base64.b64decode(value, validate=True)
    if not isinstance(value, bytes):
        raise ValueError(f"column {column!r} holds {type(value).__name__}, no picture")
    return value


def tsv_rows(path: Path) -> tuple[dict[str, str], ...]:
    """The rows of a tab-separated file by the names of its first line; every row has all of them."""
    return _tsv_rows(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _tsv_rows(path: Path, changed: int) -> tuple[dict[str, str], ...]:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise ValueError(f"the first line holds no table's column names: {str(header)[:60]}")
            return tuple(_tsv_row(header, cells, number) for number, cells in enumerate(reader) if cells)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _tsv_row(header: list[str], cells: list[str], number: int) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(f"row {number} has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def parquet_rows(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a parquet file."""
    return _parquet_rows(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _parquet_rows(path: Path, changed: int) -> tuple[dict[str, Any], ...]:
    import pyarrow
    from pyarrow import parquet

    try:
        return tuple(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
