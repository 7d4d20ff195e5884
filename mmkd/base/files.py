"""Files and folders that appear complete or not at all, however the process that writes them ends."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmkd.base.checksums import as_text, sums_in, sums_of
from mmkd.errors import DataError, MmkdError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that write by themselves say it: safetensors in words of its own, torch by the place in its code.
_FULL_WORDS = re.compile(
    r"No space left|os error (28|27|122)\b|quota exceeded|File too large|PytorchStreamWriter|inline_container", re.I
)
MIB = 2**20


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a UTF-8 text file. Its partial name is of this call alone, so that several processes may write it.

    Raises DataError where there is no room.
    """
    partial = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:8]}")
    content = text.encode("utf-8", errors)
    with room_for(partial, len(content)):
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)


def save_whole(folder: Path, save: Callable[[Path], object], needed: int | None = None) -> None:
    """Makes `folder` by `save`, which is given a place beside it; what a killed process left there is thrown away.

    Sizes and hashes of its files are kept beside it (`mmkd.base.checksums`). needed: bytes, if known. Raises DataError where
    there is no room.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with room_for(partial, needed):
        save(partial)
        write_sums(partial, sums_of(folder))
        partial.rename(folder)
        sync_folder(folder.parent)


def write_sums(folder: Path, sums: Path) -> None:
    """Waits until all files below `folder` are on the disk, then writes their sizes and hashes to `sums`: who finds that file
    finds all others, however the machine ended."""
    synced(folder)
    write_whole(sums, as_text(sums_in(folder, sums)))


def copy_whole(source: Path, target: Path) -> None:
    """Copies a folder. Raises DataError where there is no room."""
    save_whole(target, lambda partial: shutil.copytree(source, partial), size_of(source))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- onto the disk ---------------------------------------------------------------------------------------------------


def synced(folder: Path) -> None:
    """Returns when every file below a folder, and the names of all, are on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk; some file systems do not offer that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ---- room ------------------------------------------------------------------------------------------------------------


@contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """While a file or folder is written. If that fails, what is there of it goes; a full disk becomes a DataError with the bytes
    that are needed and those at hand."""
    try:
        yield
    except BaseException as error:
        remove(path)
        if isinstance(error, MmkdError) or not is_full(error):
            raise
        wanted = f"about {needed / MIB:,.1f} MiB are needed, " if needed else ""
        raise DataError(
            f"no room for {path}: {wanted}{free_bytes(path) / MIB:,.1f} MiB are left on that disk, or fewer in a quota; "
            "make room or take another output folder; the same command then goes on"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a disk without room, a quota or a limit of file sizes is the cause, in whatever words a library says it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    if isinstance(error, shutil.Error):  # of a folder that was copied: (from, to, text) of each file
        return any(f"[Errno {number}]" in str(error) for number in FULL)
    told = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return told and _FULL_WORDS.search(str(error)) is not None


def remove(path: Path) -> None:
    """Takes away a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def free_bytes(path: Path) -> int:
    """Room on the disk that a path is on, or will be."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
