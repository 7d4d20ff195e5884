"""A teacher's own view of a sample: another prompt, with what the student is not told, and other pictures.

What is compared stays the answer: teacher and student read the same answer behind different prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from mmkd.base.schema import Strict, is_default
from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question, Sample
from mmkd.errors import SampleError, did_you_mean
from mmkd.towers.samples import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

# What a prompt may name beside the keys of a question's `told` and `categories`.
FIELDS = {
    "prompt": "the student's last question as it is asked",
    "answer": "the answer of the data, as it is trained",
    "question": "the question alone",
    "reference": "the reference answer in words (of a choice its text)",
    "hint": "the context that the data give",
    "choices": "the choices, one a line",
    "ocr": "the words in the picture, separated by commas",
    "narrowed": "the right choice and a wrong one with their letters, in an order by the sample's id (LAD)",
}


class ImagesSpec(Strict):
    """Which pictures a teacher sees in place of the student's.

    crop: the key of `told` that holds a box "left, top, right, bottom", in pixels or, if none is above 1, in shares of the
    picture; a sample without one keeps its picture.  keep: the whole picture stays, before its crop.
    """

    crop: str
    keep: bool = False


class ViewSpec(Strict):
    """The keys of a teacher's view."""

    # what it is asked in place of the student's prompt: a template with {prompt} and fields of `told`
    prompt: str | None = Field(None, exclude_if=is_default(None))
    # what it sees of the sample's pictures
    images: ImagesSpec | None = Field(None, exclude_if=is_default(None))

    @field_validator("prompt")
    @classmethod
    def readable(cls, given: str | None) -> str | None:
        if given is not None:
            _pieces(given)
        return given


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """(text, field behind it) of a prompt. Raises ValueError."""
    try:
        found = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt {template!r}: {error}; write {{{{ and }}}} for braces") from error
    wrong = [name for _, name, form, conversion in found if name is not None and (not name.isidentifier() or form or conversion)]
    if wrong:
        raise ValueError(f"prompt: {{{wrong[0]}}} names no field; there are {', '.join(FIELDS)} and what the data tell")
    if not any(name for _, name, _, _ in found):
        raise ValueError("prompt names no field, so the teacher would be asked the same of every sample; begin with {prompt}")
    return [(text, name) for text, name, _, _ in found]


@dataclass(frozen=True)
class View:
    """What a teacher sees of a sample."""

    prompt: str | None = None
    images: ImagesSpec | None = None

    def __call__(self, sample: Sample) -> Sample:
        """The sample as the teacher gets it. Raises SampleError for one that lacks what the view names."""
        return self._shown(self._asked(sample))

    def _asked(self, sample: Sample) -> Sample:
        if self.prompt is None:
            return sample
        place = max(n for n, turn in enumerate(sample.prompt_turns) if turn.role == "user")
        turn, text, places = sample.turns[place], "", ()
        for piece, name in _pieces(self.prompt):
            text += piece
            if name == "prompt" and not places:
                places = tuple(len(text) + offset for offset in turn.places)
            text += self._field(sample, name, turn.text) if name else ""
        turns = [*sample.turns]
        turns[place] = replace(turn, text=text, places=places)
        return replace(sample, turns=tuple(turns))

    def _field(self, sample: Sample, name: str, asked: str) -> str:
        question = sample.meta.get("question", Question(sample.id, asked, answer=sample.answer))
        index = question.answer_index
        known = {
            "prompt": asked, "answer": sample.answer, "question": question.question, "hint": question.hint,
            "reference": question.choices[index] if index is not None and question.choices else question.answer,
            "choices": "\n".join(question.choices), "ocr": ", ".join(question.ocr_tokens),
        }  # fmt: skip
        more = question.categories | question.told
        known |= {"narrowed": _narrowed(question)} if name == "narrowed" else {}
        value = known[name] if name in known else more.get(name)
        if value is None:
            has = [*FIELDS, *more]
            raise SampleError(f"sample {sample.id!r} has no {name!r}, which teacher.prompt names; {did_you_mean(name, has)}")
        if not value and name in ("answer", "reference"):
            raise SampleError(f"sample {sample.id!r} has no {name}, which teacher.prompt names; leave it out, or give it one")
        return value

    def _shown(self, sample: Sample) -> Sample:
        if self.images is None or not sample.images:
            return sample
        question = sample.meta.get("question")
        text = question.told.get(self.images.crop) if question is not None else None
        if not text:
            return sample
        try:
            box = tuple(float(part) for part in text.replace(",", " ").split())
        except ValueError:
            box = ()
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise SampleError(f"sample {sample.id!r}: {self.images.crop} is {text!r}, not a box; write left, top, right, bottom")
        first, *others = sample.images
        crop = Crop(first, box)
        if not self.images.keep:
            return replace(sample, images=(crop, *others))
        place = next(n for n, turn in enumerate(sample.turns) if turn.images)
        turns = [*sample.turns]
        own = turns[place]
        turns[place] = replace(own, images=own.images + 1, places=(own.places[0], *own.places) if own.places else ())
        return replace(sample, images=(first, crop, *others), turns=tuple(turns))


def _narrowed(question: Question) -> str:
    """Two of a question's choices, one of them right, such as "A. a cat; C. a dog". Which wrong one, and which stands first,
    follows from the id alone. Raises SampleError for a question without choices."""
    choices, right = question.choices, question.answer_index
    if right is None or len(choices) < 2:
        raise SampleError(f"sample {question.id!r} has no choices, of which {{narrowed}} is two; leave it out of the prompt")
    draw = random.Random(f"narrowed {question.id}")
    pair = [right, draw.choice([n for n in range(len(choices)) if n != right])]
    draw.shuffle(pair)
    return "; ".join(f"{letter_of(n)}. {choices[n]}" for n in pair)


@dataclass(frozen=True)
class Crop:
    """A part of a picture. box: left, top, right, bottom, in pixels or, if none is above 1, in shares."""

    whole: Picture
    box: tuple[float, float, float, float]

    @property
    def key(self) -> str:
        return f"{self.whole.key} {self.box}"

    def exists(self) -> bool:
        return self.whole.exists()

    def load(self) -> Image:
        """Raises ImageError where the picture cannot be read, SampleError for a box outside of it."""
        picture = self.whole.load()
        scale = picture.size * 2 if max(self.box) <= 1 else (1, 1, 1, 1)
        left, top, right, bottom = (round(value * by) for value, by in zip(self.box, scale, strict=True))
        box = (max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise SampleError(f"the box {self.box} has no pixel of {self.whole.key} ({picture.width} x {picture.height})")
        return picture.crop(box)
