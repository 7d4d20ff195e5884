"""Whatever the library `datasets` can stream: folders of parquet or JSON files, data sets of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.data.annotations import Row, one_line, shown
from mmkd.data.formats import Format
from mmkd.data.reading import asked_and_answered, refuse_unseen
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register


@register("formats", "datasets")
class Datasets(Format):
    """A stream of what `datasets.load_dataset` takes as root, a folder or a hub id; `files` names its columns.

    `image` (or `images`) holds a picture, the name of one below the root, or a list of these. Files come in another order in each
    pass.
    """

    gives = "stream"
    hub = True
    own_data = True
    pictures_by = "the column `image` or `images` (`files: {image: COLUMN}` names another)"
    values = {"image": "image", "question": "question", "answer": "answer"}

    def stream(self, source: Source, seed: int, number: int) -> Iterator[Question]:
        from datasets import load_dataset

        root, split = source.root, source.split
        columns = {key: source.value(key) for key in self.values}
        try:
            rows = load_dataset(str(root), split=split, streaming=True)
            names = rows.column_names or list(next(iter(rows)))
        except (OSError, ValueError, StopIteration) as error:
            raise DataError(f"`datasets` cannot stream split {split!r} of {root}: {error}") from error
        missing = [columns[key] for key in ("question", "answer") if columns[key] not in names]
        if missing:
            raise DataError(f"{root} has no column {' or '.join(missing)}, but {', '.join(names)}; name them in `files`")
        if columns["image"] not in names:
            if columns["image"] != self.values["image"]:
                raise DataError(f"{root} has no column {columns['image']}, but {', '.join(names)}; name one in `files`")
            columns["image"] = "images"
        rows = rows.decode(False)  # pictures as they are stored
        make = partial(_question, source, columns)
        for place, row in enumerate(rows.shuffle(seed=seed + number, buffer_size=1)):  # 1: only the files change places here
            yield from source.made([Row(row, f"{root} row {place}", columns, place)], make)

    def paths(self, source: Source) -> list[Path]:
        """The files of the split where the root is a folder; none of a data set of the hub."""
        if not Path(source.root).is_dir():
            return []
        from datasets import load_dataset_builder

        try:
            files = load_dataset_builder(str(source.root)).config.data_files or {}
        except (OSError, ValueError) as error:
            raise DataError(f"`datasets` cannot read {source.root}: {one_line(error)}") from error
        return sorted(Path(path) for path in files.get(source.split, ()))


@dataclass(frozen=True)
class ImageBytes(ImageRef):
    """A picture that is there already."""

    data: bytes = field(default=b"", repr=False)

    @property
    def file(self) -> None:
        return None

    def exists(self) -> bool:
        return True

    def read_bytes(self) -> bytes:
        return self.data


def _question(source: Source, columns: Mapping[str, str], row: Row) -> Question:
    refuse_unseen(row)
    name = f"{source.split}-{row.number}"
    return asked_and_answered(name, row, tuple(_images(source, row, row.get("image")) if row.has("image") else ()))


def _images(source: Source, row: Row, cell: Any) -> Iterator[ImageRef]:
    """The pictures of a cell: as `datasets` stores them, encoded, names of files below the root, or a list of these."""
    if isinstance(cell, list):
        for entry in cell:
            yield from _images(source, row, entry)
    elif isinstance(cell, bytes) or (isinstance(cell, dict) and cell.get("bytes")):
        data, path = (cell, None) if isinstance(cell, bytes) else (cell["bytes"], cell.get("path"))
        yield ImageBytes(Path(), str(path), data)
    elif isinstance(cell, str) or (isinstance(cell, dict) and isinstance(cell.get("path"), str)):
        if name := cell if isinstance(cell, str) else cell["path"]:
            yield _below_root(source, row, name)
    elif cell is not None:
        raise row.wrong("image", "a picture, the name of one, or a list of these")


def _below_root(source: Source, row: Row, name: str) -> ImageRef:
    root = Path(source.root)
    if not root.is_dir():
        raise DataError(f"{row.where}: it names the file {shown(name)}; a data set without a folder here must hold its pictures")
    if Path(name).is_absolute():
        name = Path(os.path.relpath(name, root.absolute())).as_posix()  # `datasets` makes names of files absolute
    try:
        return ImageRef.inside(root, name)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
