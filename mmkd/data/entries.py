"""From a recipe's `data:` entry to training samples: the card, the format, the prompt."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from mmkd.base.cards import list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.data.formats import Format, format_of, read_split
from mmkd.data.lazy import Lazy
from mmkd.data.other_answers import STAND_IN, read_answers, with_answers
from mmkd.data.prompts import PromptStyle, render
from mmkd.data.samples import Question, Sample
from mmkd.data.source import Source
from mmkd.data.stream import Stream
from mmkd.data.tally import Tally
from mmkd.errors import DataError
from mmkd.towers.samples import Turn

logger = logging.getLogger(__name__)

LOOKED_AT = 2000  # questions of a large file that are put into words to see whether that works


class DataCard(Strict):
    """A data set's card: what its files are and how its questions are put to a model."""

    name: str
    title: str
    imports: tuple[str, ...] = Field((), description="modules that register a format of one's own; imported first")
    format: str
    root: str
    prompt: PromptStyle = "plain"
    ocr: bool = False
    files: dict[str, str] | None = None
    target: Literal["first", "majority", "sampled"] = "first"
    text_only: bool = False
    licence: str = ""
    source: str = ""
    notes: str = ""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        format_of(value)
        return value


def resolve(spec: Any) -> dict[str, Any]:
    """The fields of a recipe's data entry, its card's first and its own over them. Raises DataError."""
    if spec.from_ is not None and spec.root is None:
        raise DataError(f"from: {spec.from_}: it has not been written yet")
    about = {"name", "title", "imports", "licence", "source", "notes"}
    card = load_card("data", spec.card, DataCard).model_dump(exclude=about) if spec.card else {}
    given = {k: v for k, v in spec.model_dump(exclude={"card", "from_"}).items() if v is not None}
    given |= {"format": "jsonl"} if spec.from_ is not None else {}
    standard = {"prompt": "plain", "ocr": False, "files": None, "target": "first", "text_only": False, "tag": spec.card}
    fields = {**standard, **card, **given}
    missing = [name for name in ("format", "root") if name not in fields]
    if missing:
        raise DataError(f"a data entry lacks {' and '.join(missing)}; give them or name a `card`")
    return fields


def folder_of(fields: dict[str, Any], data_root: str | None) -> Path:
    """Where a data entry's files are: `data_root`/root if that is there, else root itself. Raises DataError."""
    candidates = [Path(os.path.expanduser(fields["root"]))]
    if data_root is not None:
        candidates.insert(0, Path(os.path.expanduser(data_root)) / fields["root"])
    found = next((folder for folder in candidates if os.path.exists(folder)), None)
    if found is None:
        raise DataError(
            f"there is no data folder {' or '.join(map(str, candidates))}; get the data there, or set data_root or the "
            "entry's root"
        )
    return found


def layout_of(spec: Any) -> str:
    """The files and pictures that a data entry's format looks for below its root, in words."""
    if spec.from_ is not None:
        return "what that stage writes"
    fields = resolve(spec)
    return format_of(fields["format"]).layout(fields["split"], fields["files"])


def read_samples(
    spec: Any, seed: int, data_root: str | None = None, allowed: float = 0.0, tally: Tally | None = None
) -> Sequence[Sample]:
    """The training samples of one data entry, its subset drawn by `seed`; of a stream its first ones. Raises DataError.

    allowed: the share of rows, rounded up, that may be left out since they cannot be used; what was left out is logged.
    tally: gets what was left out, but of a stream.
    """
    stream = stream_of(spec, seed, data_root, allowed)
    fields = resolve(spec)
    name = f"{spec.card or fields['format']} {fields['root']}"
    if stream is not None:
        samples = stream.head()
        _check_stream(samples, stream.tally, fields, name)
        return samples
    tally = Tally() if tally is None else tally
    items = read_split(
        fields["format"],
        folder_of(fields, data_root),
        fields["split"],
        files=fields["files"],
        target=_own_target(fields),
        limit=fields.get("limit"),
        image_limit=fields.get("image_limit"),
        seed=seed,
        allowed=allowed,
        needs_pictures=not fields["text_only"],
        tally=tally,
    )
    samples = _rendered(items, fields, tally, allowed)
    for line in tally.lines():
        logger.info("data %s: %s", name, line)
    if fields.get("answers") is not None:
        samples = with_answers(samples, read_answers(fields["answers"]), name)
    return _weighted(samples, fields["weight"], seed)


def _rendered(items: Sequence[Question | Sample], fields: dict[str, Any], tally: Tally, allowed: float) -> Sequence[Sample]:
    """The items as samples; those that cannot be trained on, such as questions without an answer, are left out and counted."""
    make = partial(_sample, fields=fields)
    looked_at = items[:: max(1, len(items) // LOOKED_AT)] if isinstance(items, Lazy) else items
    samples = []
    for item in looked_at:
        try:
            samples.append(make(item))
        except DataError as error:
            tally.drop(f"question {item.id!r}", error)
    tally.check(allowed)
    return items.then(make) if isinstance(items, Lazy) else samples


def _check_stream(samples: Sequence[Sample], tally: Tally, fields: dict[str, Any], name: str) -> None:
    """Says what its first samples show of a stream. Raises DataError where none has a picture."""
    format = format_of(fields["format"])
    tally.made(samples)
    tally.own = format.own_data
    if not fields["text_only"]:
        tally.refuse_no_pictures(f"the first samples of {name}", format.pictures_by)
    for line in tally.lines():
        logger.info("data %s: %s", name, line)


def stream_of(
    spec: Any, seed: int, data_root: str | None = None, allowed: float = 0.0, one_answer: bool = False
) -> Stream | None:  # fmt: skip
    """The stream of a data entry, None for one whose samples are all read. Raises DataError for what a stream cannot do.

    allowed: the share of rows that may be left out since they cannot be used.  one_answer: a sample for each answer of a talk.
    """
    if spec.from_ is not None:
        return None
    fields = resolve(spec)
    format = format_of(fields["format"])
    if format.gives != "stream":
        return None
    wrong = [name for name in ("limit", "image_limit") if fields.get(name) is not None]
    wrong += ["weight"] if fields.get("weight", 1.0) != 1.0 else []
    wrong += ["answers or target: teacher"] if _others_answer(fields) else []
    if wrong:
        raise DataError(f"format {fields['format']!r} takes no {' or '.join(wrong)}: nobody knows how many samples there are")
    source = source_of(fields, data_root)
    if not format.hub:
        format.paths(source)  # whether there are any, before training

    passes = partial(_stream_samples, format, source, fields, seed, allowed)
    return Stream(partial(_by_answer, passes) if one_answer else passes, seed, tally=source.tally)


def _stream_samples(
    format: Format, source: Source, fields: dict[str, Any], seed: int, allowed: float, number: int
) -> Iterator[Sample]:
    """One pass over a stream. Raises DataError where more rows than are allowed cannot be used."""
    tally = source.tally
    counted = tally.count
    for item in itertools.chain(format.stream(source, seed, number), [None]):  # None: the rows behind the last item
        try:
            sample = None if item is None else _sample(item, fields)
        except DataError as error:
            sample = None
            tally.drop(f"question {item.id!r}", error)
        if tally.count > counted:
            counted = tally.count
            tally.check_stream(allowed)
        if sample is not None:
            yield sample


def _by_answer(passes: Callable[[int], Iterator[Sample]], number: int) -> Iterator[Sample]:
    return (one for sample in passes(number) for one in sample.by_answer())


def source_of(fields: dict[str, Any], data_root: str | None) -> Source:
    """What the format of a data entry's fields is given to read. Raises DataError."""
    format = format_of(fields["format"])
    root = fields["root"] if format.hub else folder_of(fields, data_root)
    return format.source(root, fields["split"], fields["files"], target=_own_target(fields))


def _own_target(fields: dict[str, Any]) -> str:
    """Which of the data's own answers is read."""
    return "first" if fields["target"] == "teacher" else fields["target"]


def _others_answer(fields: dict[str, Any]) -> bool:
    return fields["target"] == "teacher" or fields.get("answers") is not None


def _sample(item: Question | Sample, fields: dict[str, Any]) -> Sample:
    sample = _asked(item, fields)
    return sample if fields.get("tag") is None else replace(sample, meta={**sample.meta, "tag": fields["tag"]})


def _asked(item: Question | Sample, fields: dict[str, Any]) -> Sample:
    if isinstance(item, Sample):
        return item
    sample = render(item, fields["prompt"], with_answer=not _others_answer(fields), ocr=fields["ocr"])
    return replace(sample, turns=(*sample.turns, Turn("assistant", STAND_IN))) if _others_answer(fields) else sample


def _weighted(samples: Sequence[Sample], weight: float, seed: int) -> Sequence[Sample]:
    """`weight` copies of the set; the fraction is drawn."""
    whole, part = int(weight), weight - int(weight)
    drawn = random.Random(f"weight {seed}").sample(range(len(samples)), round(part * len(samples)))
    if isinstance(samples, Lazy):
        places = np.concatenate([np.tile(np.arange(len(samples)), whole), np.array(drawn, dtype=np.int64)])
        return samples if weight == 1 else samples.taken(places)
    return [*samples] * whole + [samples[place] for place in drawn]


README_HEAD = """\
The code is in `mmkd/data`; this folder holds cards only.

# Data sets

A card says what a data set's files are and how its questions are put to a model. A recipe names it (`data: [{card: scienceqa}]`)
and says where it lies (`data_root=FOLDER`; the card's `root` is looked for inside, then as it stands). Everything of a card
can be given in the recipe instead, for data of your own: `{format: jsonl, root: my_data, prompt: plain}` reads
`my_data/train.jsonl` with `{"image": "a.png", "question": "...", "answer": "..."}` a line. Cards of your own go into
`<folder>/data/`, with `MMKD_CARDS=<folder>`.

| card | what | format | prompt | licence |
|---|---|---|---|---|
"""
README_FOOT = "\nThis table is written by `python -m mmkd.data.entries`; edit the cards, not the table.\n"


def readme() -> str:
    """The text of data/README.md: one row a card."""
    cards = [load_card("data", name, DataCard) for name in list_cards("data")]
    rows = [f"| `{c.name}` | {c.title} | {c.format} | {c.prompt} | {c.licence} |" for c in cards]
    return README_HEAD + "\n".join(rows) + "\n" + README_FOOT


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / "data" / "README.md").write_text(readme(), encoding="utf-8")
