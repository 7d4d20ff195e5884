"""Training samples that come one after another, where there is no room for all of them: tar shards, or `datasets` streaming.

    format: shards      root/*.tar in WebDataset's layout: 000001.json with "question" and "answer", and 000001.jpg (or png, webp)
    format: datasets    root is what `datasets.load_dataset` takes, a folder or a hub id; `files` names its columns

The order follows from the seed alone: pass after pass over the source, shards in another order each time, samples through a
shuffling buffer. So a resumed run goes on with the sample that comes next, after running past those it had (their headers only,
with tar shards).
"""

from __future__ import annotations

import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.annotations import parse
from mmkd.data.prompts import render
from mmkd.data.samples import ImageRef, Question, Sample
from mmkd.errors import DataError, ImageError

STREAMS = ("shards", "datasets")
BUFFER = 1024  # samples that are shuffled among one another
HEAD = 512  # samples that are looked at before training: by guards, by the estimate, by a tokenizer that is trained
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = {"image": "image", "question": "question", "answer": "answer"}


@dataclass(frozen=True)
class TarPicture(ImageRef):
    """A picture in a tar shard that is read when it is wanted: `size` bytes from `offset` of the file `root`."""

    offset: int = 0
    size: int = 0

    def read_bytes(self) -> bytes:
        try:
            with self.root.open("rb") as shard:
                shard.seek(self.offset)
                data = shard.read(self.size)
        except OSError as error:
            raise ImageError(f"image {self.key} cannot be read: {error}") from error
        if len(data) < self.size:
            raise ImageError(f"image {self.key} cannot be read: the shard ends in it; is the download complete?")
        return data


@dataclass(frozen=True)
class PictureBytes(ImageRef):
    """A picture that is there already."""

    data: bytes = field(default=b"", repr=False)

    def read_bytes(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Stream:
    """An endless order of samples. passes: the samples of pass 0, 1, 2 ..., each in an order of its own."""

    passes: Callable[[int], Iterator[Sample]]
    seed: int
    buffer: int = BUFFER

    def __iter__(self) -> Iterator[Sample]:
        for number in itertools.count():
            found = 0
            for sample in shuffled(self.passes(number), self.buffer, random.Random(f"stream {self.seed} {number}")):
                found += 1
                yield sample
            if not found:
                raise DataError("a stream has no samples")

    def head(self, count: int = HEAD) -> list[Sample]:
        """The first samples of the order, fewer if a whole pass has fewer."""
        return list(itertools.islice(shuffled(self.passes(0), self.buffer, random.Random(f"stream {self.seed} 0")), count))


def shuffled(samples: Iterator[Sample], buffer: int, draw: random.Random) -> Iterator[Sample]:
    """Each sample changes places with one of the `buffer` before it."""
    kept: list[Sample] = []
    for sample in samples:
        if len(kept) < buffer:
            kept.append(sample)
            continue
        place = draw.randrange(buffer)
        kept[place], sample = sample, kept[place]
        yield sample
    draw.shuffle(kept)
    yield from kept


def open_stream(fields: dict[str, Any], root: Path | str, seed: int) -> Stream:
    """The stream of a data entry (see `sources.resolve`). Raises DataError for what a stream cannot do."""
    wrong = [name for name in ("limit", "image_limit") if fields.get(name) is not None]
    wrong += ["weight"] if fields.get("weight", 1.0) != 1.0 else []
    if wrong:
        raise DataError(f"format {fields['format']!r} takes no {' or '.join(wrong)}: nobody knows how many samples there are")
    if fields["format"] == "shards":
        paths = sorted(Path(root).glob((fields["files"] or {}).get("shards", "*.tar")))
        if not paths:
            raise DataError(f"{root} has no tar shards; `files: {{shards: PATTERN}}` says how they are called (default: *.tar)")
        return Stream(lambda number: _of_shards(paths, fields, random.Random(f"shards {seed} {number}")), seed)
    columns = COLUMNS | (fields["files"] or {})
    return Stream(lambda number: _of_datasets(str(root), fields, columns, seed + number), seed)


def _sample(name: str, row: Any, images: tuple[ImageRef, ...], fields: dict[str, Any], where: str) -> Sample:
    texts = {key: row.get(key) if isinstance(row, dict) else None for key in ("question", "answer")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if wrong:
        raise DataError(f"{where}: {' and '.join(wrong)} must be text, as in {json.dumps({'question': '?', 'answer': '!'})}")
    question = Question(id=name, question=texts["question"], images=images, answer=texts["answer"])
    return render(question, fields["prompt"], with_answer=True)


# ---- tar -------------------------------------------------------------------------------------------------------------


def _of_shards(paths: list[Path], fields: dict[str, Any], draw: random.Random) -> Iterator[Sample]:
    for path in draw.sample(paths, len(paths)):
        for key, files in _grouped(path):
            row = next((m for suffix, m in files.items() if suffix == ".json"), None)
            if row is None:
                raise DataError(f"{path}: {key} has no .json; a sample is {key}.json, and {key}.jpg where it has a picture")
            text = TarPicture(path, row.name, row.offset_data, row.size).read_bytes()
            where = f"{path}/{row.name}"
            images = tuple(TarPicture(path, m.name, m.offset_data, m.size) for s, m in files.items() if s in PICTURES)
            yield _sample(f"{path.stem}/{key}", parse(text.decode("utf-8", "replace"), where), images, fields, where)


def _grouped(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(name without suffix, {suffix: member}) of neighbouring members. Only their headers are read."""
    try:
        with tarfile.open(path, "r:") as shard:
            members = (m for m in shard if m.isfile())
            for key, group in itertools.groupby(members, key=lambda m: m.name.rpartition(".")[0]):
                yield key, {f".{m.name.rpartition('.')[2].lower()}": m for m in group}
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is no whole, uncompressed tar: {error}") from error


# ---- datasets --------------------------------------------------------------------------------------------------------


def _of_datasets(root: str, fields: dict[str, Any], columns: dict[str, str], seed: int) -> Iterator[Sample]:
    from datasets import Image, load_dataset

    try:
        rows = load_dataset(root, split=fields["split"], streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except (OSError, ValueError, StopIteration) as error:
        raise DataError(f"`datasets` cannot stream split {fields['split']!r} of {root}: {error}") from error
    missing = [columns[key] for key in ("question", "answer") if columns[key] not in names]
    if missing:
        raise DataError(f"{root} has no column {' or '.join(missing)}, but {', '.join(names)}; name them in `files`")
    if columns["image"] in names:
        rows = rows.cast_column(columns["image"], Image(decode=False))
    for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=1)):  # 1: only the files change places here
        texts = {key: row[columns[key]] for key in ("question", "answer")}
        yield _sample(f"{fields['split']}-{number}", texts, _pictures(row.get(columns["image"])), fields, f"{root} row {number}")


def _pictures(cell: dict[str, Any] | None) -> tuple[ImageRef, ...]:
    if cell is None:
        return ()
    if cell.get("bytes"):
        return (PictureBytes(Path(), str(cell.get("path")), cell["bytes"]),)
    return (ImageRef(Path(cell["path"]).parent, Path(cell["path"]).name),)
