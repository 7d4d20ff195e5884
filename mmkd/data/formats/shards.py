"""Tar shards in WebDataset's layout."""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmkd.data.annotations import Row, parse, shown
from mmkd.data.formats import Format
from mmkd.data.reading import asked_and_answered, refuse_unseen
from mmkd.data.samples import MAX_BYTES, ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError, ImageError
from mmkd.registry import register

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@register("formats", "shards")
class Shards(Format):
    """A stream of tar shards: 000001.json with "question" and "answer", and 000001.jpg (or png, webp) where it has a picture.

    Shards come in another order in each pass. A resumed run runs past the samples that it had, their headers only.
    """

    gives = "stream"
    own_data = True
    pictures_by = "members .jpg, .png or .webp beside each .json"
    files = {"shards": "*.tar"}

    def stream(self, source: Source, seed: int, number: int) -> Iterator[Question]:
        paths = self.paths(source)
        for path in random.Random(f"shards {seed} {number}").sample(paths, len(paths)):
            for key, members in _grouped(path):
                yield from source.made([partial(_row, path, key, members)], partial(_question, path, key, members))

    def paths(self, source: Source) -> list[Path]:
        try:
            paths = super().paths(source)
        except DataError as error:
            raise DataError(
                f"{source.root} has no tar shards; `files: {{shards: PATTERN}}` says how they are called (default: *.tar)"
            ) from error
        cut = [path for path in paths if not _is_whole(path)]
        if cut:
            others = f" and {len(cut) - 1} others of {len(paths)}" if len(cut) > 1 else ""
            raise DataError(f"{cut[0]}{others} is no whole, uncompressed tar: its end is missing; is the download complete?")
        return paths


@dataclass(frozen=True)
class TarImage(ImageRef):
    """A picture in a tar shard that is read when it is wanted: `size` bytes from `offset` of the file `root`."""

    offset: int = 0
    size: int = 0

    @property
    def file(self) -> Path:
        return self.root

    def exists(self) -> bool:
        return self.root.is_file()

    def read_bytes(self) -> bytes:
        try:
            with self.root.open("rb") as shard:
                shard.seek(self.offset)
                data = shard.read(min(self.size, MAX_BYTES))
        except OSError as error:
            raise ImageError(f"image {self.key} cannot be read: {error}") from error
        if len(data) < self.size:
            raise ImageError(f"image {self.key} cannot be read: the shard ends in it; is the download complete?")
        return data


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the two empty blocks that end a tar; one that was cut ends with a piece of a sample."""
    size = path.stat().st_size
    with path.open("rb") as shard:
        shard.seek(max(0, size - 1024))
        return size % 512 == 0 and size >= 1024 and not any(shard.read())


def _row(path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> Row:
    member = members.get(".json")
    if member is None:
        raise DataError(f"{path}: {key} has no .json; a sample is {key}.json, and {key}.jpg where it has a picture")
    if member.size > MAX_BYTES:
        raise DataError(f"{path}: {member.name} has {member.size:,} bytes; a question and an answer are expected")
    text = TarImage(path, member.name, member.offset_data, member.size).read_bytes()
    where = f"{path}/{member.name}"
    return Row(parse(text.decode("utf-8", "replace"), where), where)


def _question(path: Path, key: str, members: dict[str, tarfile.TarInfo], row: Row) -> Question:
    refuse_unseen(row)
    images = tuple(TarImage(path, m.name, m.offset_data, m.size) for suffix, m in members.items() if suffix in _PICTURES)
    strange = [name for suffix, m in members.items() if suffix not in (*_PICTURES, ".json") and (name := m.name)]
    if strange and not images:
        raise DataError(f"{row.where}: {shown(strange[0])} is no picture that is read; there are {', '.join(_PICTURES)}")
    return asked_and_answered(f"{path.stem}/{key}", row, images)


def _grouped(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(name without suffix, {suffix: member}) of neighbouring members. Only their headers are read."""
    try:
        with tarfile.open(path, "r:") as shard:
            members = (m for m in shard if m.isfile())
            for key, group in itertools.groupby(members, key=lambda m: m.name.rpartition(".")[0]):
                yield key, {f".{m.name.rpartition('.')[2].lower()}": m for m in group}
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is no whole, uncompressed tar: {error}") from error
