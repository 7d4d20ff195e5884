"""What one piece of data is: an image, a question as a data set states it, a sample as a tower reads it.

A *question* keeps the fields of the data set (choices, hint, ten references) and knows nothing of prompts.
A *sample* is what a tower prepares: images and chat turns. `mmkd.data.prompts` turns the first into the
second, for training and for evaluation alike, so that a model is asked as it was taught.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mmkd.data import pictures
from mmkd.data.tables import picture_of_cell
from mmkd.errors import DataError, ImageError
from mmkd.towers.samples import Sample, Turn

__all__ = [
    "IMAGE_MARKER", "TABLES", "ImageRef", "Question", "Sample", "Turn", "archive_members", "check_images",
    "missing_images",
]  # fmt: skip

# Where LLaVA's data files and prompts place an image. Turns carry a count instead, so no text may hold it.
IMAGE_MARKER = "<image>"


MAX_BYTES = 2**29  # of one picture's file: 64 megapixels of eight bytes

# Files whose cells hold pictures; an ImageRef with such a root names row and column.
TABLES = (".tsv", ".parquet")


@lru_cache(maxsize=16)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    """One handle for each process: forked workers that share one would move each other's file position."""
    return zipfile.ZipFile(path)


def archive_members(archive: Path) -> dict[str, tuple[int, int]]:
    """{name: (size, CRC)} of a zip archive's members. Raises DataError for what is no archive."""
    return _members(archive, archive.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _members(archive: Path, changed: int) -> dict[str, tuple[int, int]]:
    """`changed`, the archive's time of change, keeps the cache from outliving the file."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return {member.filename: (member.file_size, member.CRC) for member in opened.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} is no readable zip archive: {error}; is the download complete?") from error


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes. Raises ValueError for one that would unpack to more than a picture has."""
    _check_size(archive.getinfo(name).file_size)
    return archive.read(name)  # ends at the size that the archive's directory says


def _regular(path: Path) -> Path:
    """Raises ValueError for what is no regular file: devices and pipes may have no end. OSError where there is none."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    _check_size(found.st_size)
    return path


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, over {MAX_BYTES:,}; no picture that is read here needs as many")


@lru_cache(maxsize=256)
def _resolved(root: Path) -> Path:
    return root.resolve()


def _stays_inside(root: Path, name: str) -> bool:
    """Whether `(root / name).resolve()` lies in the resolved folder `root`.

    There are as many names as pictures, so plain ones are not made paths, and folders are asked once whether they are links.
    """
    if _is_plain(name):
        folder, _, last = name.rpartition("/")
        below, inside = _below(root, folder)
        path = f"{below}/{last}"
        if not _is_link(path):
            return inside
    return (root / name).resolve().is_relative_to(root)


def _is_plain(name: str) -> bool:
    """Whether a name leads down from folder to folder, and has nothing that is special on some system (drives, backslashes)."""
    return not ({"", ".", ".."} & {*name.split("/")}) and ":" not in name and "\\" not in name


@lru_cache(maxsize=4096)
def _below(root: Path, folder: str) -> tuple[str, bool]:
    """Where `folder` below the resolved `root` leads, and whether that is inside `root`."""
    if not folder:
        return str(root), True
    above, _, last = folder.rpartition("/")
    path, inside = _below(root, above)
    path = f"{path}/{last}"
    if not _is_link(path):
        return path, inside
    real = Path(path).resolve()
    return str(real), real.is_relative_to(root)


def _is_link(path: str) -> bool:
    """Raises ValueError for a name that no file can have."""
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # not there, which loading will tell
        return False


@dataclass(frozen=True)
class ImageRef:
    """A picture that has not been read yet: a file under `root`, a member of the zip archive `root`, or a cell of
    the table `root` (see `mmkd.data.tables`).

    Resolving the path inside its root happens when the reference is made (see `ImageRef.inside`).
    """

    root: Path
    name: str

    @staticmethod
    def inside(root: Path, name: str) -> ImageRef:
        """A reference to `name` under the folder or zip `root`.

        Raises DataError for a name that leaves its root, by `..`, as an absolute path or through a link,
        and for one that no file can have.
        """
        root = root if isinstance(root, Path) else Path(root)  # making a path anew is most of this function's time
        if root.suffix == ".zip":
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise DataError(f"image {name!r} leaves its archive {root}; use a name inside the archive")
            return ImageRef(root, name)
        try:
            inside = _stays_inside(_resolved(root), name)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"image path {name[:80]!r} cannot be a file's name: {error}") from error
        if not inside:
            raise DataError(f"image path {name!r} leaves its root {root}; keep images inside the root folder")
        return ImageRef(root, name)

    @property
    def key(self) -> str:
        return f"{self.root}/{self.name}"

    @property
    def file(self) -> Path | None:
        """The file that holds the picture's bytes; None for one that is in memory."""
        return self.root if self.root.suffix == ".zip" or self.root.suffix in TABLES else self.root / self.name

    def exists(self) -> bool:
        """Whether the file, or the archive's member, is there; nothing is decoded. Raises DataError for a damaged archive."""
        if self.root.suffix == ".zip":
            return self.root.is_file() and self.name in archive_members(self.root)
        if self.root.suffix in TABLES:
            return self.root.is_file()
        try:
            return (self.root / self.name).is_file()
        except OSError:  # a name that is longer than a file can have
            return False

    def read_bytes(self) -> bytes:
        """The encoded picture. Raises ImageError when it is not there or its archive is damaged."""
        try:
            if self.root.suffix == ".zip":
                return _unpacked(_open_zip(str(self.root), os.getpid()), self.name)
            if self.root.suffix in TABLES:
                return picture_of_cell(self.root, self.name)
            return _regular(self.root / self.name).read_bytes()
        except (
            OSError,
            EOFError,
            KeyError,
            RuntimeError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise ImageError(f"image {self.key} cannot be read: {error}") from error

    def load(self) -> Image.Image:
        """The picture in RGB, as `mmkd.data.pictures.decode` gives it. Raises ImageError when it cannot be read or decoded."""
        data = self.read_bytes()
        try:
            return pictures.decode(data)
        except Exception as error:  # decoders raise errors of any type on damaged data
            raise ImageError(f"image {self.key} does not decode: {error!r}") from error


@dataclass(frozen=True)
class Question:
    """One row of a data set, in the data set's own terms.

    `answer` is the training target (text; for multiple choice the letter is made from `answer_index`).
    `references` are all reference answers that a scorer uses (ten for TextVQA, one for a plain set).
    `categories` are the groups that a result is broken down by, e.g. {"subject": "natural science"}.
    """

    id: str
    question: str
    images: tuple[ImageRef, ...] = ()
    answer: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer_index: int | None = None
    hint: str = ""
    ocr_tokens: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()  # names of everything in the picture, where that is known (the embedded sample, easy-VQA)
    claims: dict[str, str] = field(default_factory=dict)  # answer -> what it says is in the picture ("is there a circle?")
    categories: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)  # what else the data say: a lecture, a solution, a box


def missing_images(items: Iterable[Question | Sample]) -> tuple[list[str], int]:
    """The keys of the pictures that are not there, in order, and how many pictures there should be; see `check_images`."""
    refs = {ref.key: ref for item in items for ref in item.images}
    return [key for key, ref in refs.items() if not ref.exists()], len(refs)


def check_images(items: Iterable[Question | Sample], *, allowed_missing: int = 0) -> int:
    """The number of pictures that are not there; more than `allowed_missing` raise DataError.

    A picture counts once however many questions it has. Looks only for the file or the archive's member; nothing is decoded.
    """
    missing, count = missing_images(items)
    if len(missing) > allowed_missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {count} images are missing (allowed: {allowed_missing}): {names}; "
            "complete the download or correct the pattern of the images"
        )
    return len(missing)
