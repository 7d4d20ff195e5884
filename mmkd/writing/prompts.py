"""From samples to what an author is asked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.prompts import letter_of
from mmkd.data.samples import ImageRef, Question, Sample, Turn
from mmkd.errors import DataError, ImageError, SampleError, one_line
from mmkd.writing.card import PromptCard
from mmkd.writing.regions import Region, regions_of, shown, without
from mmkd.writing.templates import filled

UNASKED = (DataError, ImageError, SampleError)  # for which a sample is left out, and counted


@dataclass(frozen=True)
class Prompt:
    """What is asked of one sample. fields: what templates know.  pictures: of the row that comes of it."""

    id: str
    question: Question
    sample: Sample
    fields: dict[str, Any]
    pictures: tuple[Any, ...]


@dataclass(frozen=True)
class Unasked:
    """A sample of which nothing can be asked."""

    id: str
    reason: str


def prompts_of(
    samples: Iterable[Sample], card: PromptCard, per: str, context: Mapping[str, Any] | None = None
) -> Iterator[Prompt | Unasked]:
    """The prompts of samples, in their order.

    per: "question", "picture" (the first question on each) or "region" (of the first picture).
    """
    seen: set[Any] = set()
    for sample in samples:
        question = question_of(sample)
        if per != "question":
            key = tuple(ref.key for ref in sample.images) or sample.id
            regions = question.told.get(card.regions, "") if per == "region" else ""
            if (key, regions) in seen:
                continue
            seen.add((key, regions))
        try:
            regions_here: list[Region] = regions_of(question, card.regions)
        except DataError as error:
            yield Unasked(sample.id, one_line(error, 200))
            continue
        if per == "region":
            for number, region in enumerate(regions_here):
                yield _made(f"{sample.id} region {number + 1}", sample, question, card, region, regions_here, context)
        else:
            first = regions_here[0] if regions_here else None
            yield _made(sample.id, sample, question, card, first, regions_here, context)


def question_of(sample: Sample) -> Question:
    """The question behind a sample; of a talk its last turn."""
    asked = next((turn.text for turn in reversed(sample.prompt_turns) if turn.role == "user"), "")
    found = sample.meta.get("question")
    return found if found is not None else Question(sample.id, asked, answer=sample.answer, images=sample.images)


def _made(
    name: str, sample: Sample, question: Question, card: PromptCard, region: Region | None, regions: Sequence[Region],
    context: Mapping[str, Any] | None,
) -> Prompt | Unasked:  # fmt: skip
    asked = next((turn.text for turn in reversed(sample.prompt_turns) if turn.role == "user"), "")
    fields = {**fields_of(name, question, asked), "context": dict(context or {})}
    fields["regions"] = [{"label": one.label, "box": list(one.box)} for one in regions]
    if region is not None:
        fields["region"] = {"label": region.label, "box": list(region.box)}
    try:
        look = card.pictures
        own = without(shown(sample.images, look.author, region, look.margin, look.line), look.without)
        row = shown(sample.images, look.row, region, look.margin, look.line)
        return Prompt(name, question, _asked(name, card, fields, own), fields, row)
    except UNASKED as error:
        return Unasked(name, one_line(error, 200))


def fields_of(name: str, question: Question, asked: str) -> dict[str, Any]:
    """What templates know of a question."""
    index, choices = question.answer_index, question.choices
    return {
        "id": name, "question": question.question, "prompt": asked, "hint": question.hint,
        "answer": choices[index] if index is not None and choices else question.answer,
        "references": list(question.references), "ocr": list(question.ocr_tokens),
        "choices": [{"letter": letter_of(n), "text": choice} for n, choice in enumerate(choices)],
        "categories": dict(question.categories), "told": dict(question.told),
    }  # fmt: skip


def _asked(name: str, card: PromptCard, fields: Mapping[str, Any], pictures: tuple[Any, ...]) -> Sample:
    turns, images = [], []
    if card.system:
        turns.append(Turn("system", filled(card.system, fields)))
    for example in card.examples:
        if example.image is not None:
            path = Path(example.image)
            images.append(ImageRef.inside(path.parent, path.name))
        turns.append(Turn("user", filled(example.prompt, fields), int(example.image is not None)))
        turns.append(Turn("assistant", filled(example.answer, fields)))
    text = filled(card.prompt, fields)
    if not text:
        raise DataError("its prompt is empty")
    turns.append(Turn("user", text, len(pictures)))
    return Sample(name, (*images, *pictures), tuple(turns))


class Digests:
    """Hashes of pictures by their content, each made once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, picture: Any) -> str:
        """Of a file its bytes, of a part of one its pixels. Raises ImageError, SampleError."""
        if picture.key not in self._known:
            digest = hashlib.blake2b(digest_size=16)
            if isinstance(picture, ImageRef):
                digest.update(picture.read_bytes())
            else:
                loaded = picture.load()
                digest.update(str(loaded.size).encode() + loaded.tobytes())
            self._known[picture.key] = digest.hexdigest()
        return self._known[picture.key]


def encoded(picture: Any) -> tuple[bytes, str]:
    """The bytes of a picture and the ending of its file's name: as they are, of a part of one as PNG. Raises ImageError,
    SampleError."""
    if isinstance(picture, ImageRef):
        ending = Path(picture.name).suffix.lower()
        return picture.read_bytes(), ending if 1 < len(ending) <= 6 and ending[1:].isalnum() else ".img"
    buffer = io.BytesIO()
    picture.load().save(buffer, "PNG")
    return buffer.getvalue(), ".png"
