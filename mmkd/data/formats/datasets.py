"""Whatever the library `datasets` can stream: folders of parquet or JSON files, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.annotations import one_line
from mmkd.data.formats import Format
from mmkd.data.reading import asked_and_answered
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register


@register("formats", "datasets")
class Datasets(Format):
    """A stream of what `datasets.load_dataset` takes as root, a folder or a hub id; `files` names its columns.

    Files come in another order in each pass.
    """

    gives = "stream"
    hub = True
    values = {"image": "image", "question": "question", "answer": "answer"}

    def stream(self, source: Source, seed: int, number: int) -> Iterator[Question]:
        from datasets import Image, load_dataset

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
        if columns["image"] in names:
            rows = rows.cast_column(columns["image"], Image(decode=False))
        for place, row in enumerate(rows.shuffle(seed=seed + number, buffer_size=1)):  # 1: only the files change places here
            texts = {key: row[columns[key]] for key in ("question", "answer")}
            images = _images(row.get(columns["image"]))
            yield asked_and_answered(f"{split}-{place}", texts, images, f"{root} row {place}")

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


def _images(cell: dict[str, Any] | None) -> tuple[ImageRef, ...]:
    if cell is None:
        return ()
    if cell.get("bytes"):
        return (ImageBytes(Path(), str(cell.get("path")), cell["bytes"]),)
    return (ImageRef(Path(cell["path"]).parent, Path(cell["path"]).name),)
