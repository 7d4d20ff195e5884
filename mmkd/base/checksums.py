"""Whether files are still what was written: sizes and hashes (XXH3, 128 bit) of a folder's files, kept in one JSON file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

from mmkd.errors import DataError, one_line

_BLOCK = 4 * 2**20  # bytes that are hashed at a time


def hash_of(path: Path) -> str:
    """Of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sums_in(folder: Path, but: Path | None = None) -> dict[str, list]:
    """{file: [size, hash]} of all files below a folder."""
    return {name: [path.stat().st_size, hash_of(path)] for name, path in _files(folder, but).items()}


def as_text(files: dict[str, list]) -> str:
    """The content of a file of sums: they have a sum, too."""
    return json.dumps({"files": files, "sum": xxhash.xxh3_128(json.dumps(files).encode()).hexdigest()}, indent=1) + "\n"


def changed(folder: Path, sums: Path) -> str:
    """What is no longer as its sums say, in words; "" where all is. Every file is read.

    A file that came later is none of its business.
    """
    try:
        text = sums.read_text(encoding="utf-8")
        recorded = json.loads(text)["files"]
        wanted = {str(name): (int(size), str(digest)) for name, (size, digest) in recorded.items()}
        if text != as_text(recorded):
            return f"{sums.name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{sums.name} cannot be read ({one_line(error) or type(error).__name__})"
    if not wanted:
        return f"{sums.name} names no files"
    present = _files(folder, sums)
    for name, (size, digest) in wanted.items():
        if name not in present:
            return f"{name} is missing"
        try:
            there = present[name].stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes of {size:,}"
            if hash_of(present[name]) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def sums_of(folder: Path) -> Path:
    """The file beside a folder that `mmkd.base.files.save_whole` made, with its sums."""
    return folder.with_name(f".{folder.name}.sums")


def check_whole(folder: Path, way_out: str) -> None:
    """Raises DataError where a folder is no longer what was written. Without sums, such as of a folder that was copied here,
    there is nothing to compare with."""
    sums = sums_of(folder)
    if sums.exists() and (wrong := changed(folder, sums)):
        raise DataError(f"{folder} changed since it was written: {wrong}; {way_out}")


def same_sums(folder: Path, other: Path) -> bool:
    """Whether two folders that `mmkd.base.files.save_whole` made were written with the same content."""
    texts = [path.read_bytes() if path.exists() else None for path in map(sums_of, (folder, other))]
    return texts[0] is not None and texts[0] == texts[1]


def _files(folder: Path, but: Path | None) -> dict[str, Path]:
    paths = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path != but}
