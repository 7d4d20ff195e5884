"""Hashes of files, known for as long as size and time of change stay the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mmkd.errors import DataError

_BLOCK = 2**20

_known: dict[tuple[str, int, int], str] = {}  # (path, size, time of change) -> hash, for this process


def content_hash(path: Path, stat: os.stat_result | None = None) -> str:
    """The hash of a file's content. Raises DataError where it cannot be read."""
    try:
        stat = stat or path.stat()
        key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
        if key not in _known:
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
            _known[key] = digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return _known[key]
