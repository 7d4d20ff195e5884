"""Files and folders that appear complete or not at all, however the process that writes them ends."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a UTF-8 text file. Its partial name is of this call alone, so that several processes may write it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with partial.open("w", encoding="utf-8", errors=errors, newline="\n") as stream:
        stream.write(text)
    os.replace(partial, path)


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Makes `folder` by `save`, which is given a place beside it; what a killed process left there is thrown away."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    partial.rename(folder)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a folder."""
    save_whole(target, lambda partial: shutil.copytree(source, partial))
