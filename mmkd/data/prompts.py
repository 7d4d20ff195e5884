"""Turns questions into samples: the one place that words prompts, for training and for evaluation alike.

- `letter`: context, question, the choices by letter, "Answer with the option's letter from the given choices
  directly."; the answer is the letter. LLaVA-1.5's prompt for ScienceQA.
- `short`: context, question, OCR tokens if wanted, "Answer the question using a single word or phrase."; the answer is
  text. LLaVA-1.5's prompt for TextVQA, VQAv2 and the like.
- `plain`: the question alone; the answer is text.
- `mmmu`: MMMU's words for LLaVA-1.5: letters in brackets, blank lines between the parts; `short` in the same layout for a
  question without choices.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Literal, get_args

from mmkd.data.reading import check_markers, placed
from mmkd.data.samples import IMAGE_MARKER, Question, Sample, Turn
from mmkd.errors import DataError

PromptStyle = Literal["letter", "short", "plain", "mmmu"]
STYLES = get_args(PromptStyle)
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."


def render(
    question: Question, style: str, *, with_answer: bool, ocr: bool = False, instruction: str | None = None
) -> Sample:
    """The sample that asks `question` in a style of `STYLES`; `Sample.meta["question"]` is the question.

    `with_answer`: append the answer as the assistant's turn (training). `ocr`: name the reference OCR
    tokens, style "short" only; without tokens the line stands there empty, as in LLaVA's evaluation files.
    A hint leads the prompt as context in the styles "letter" and "short". `instruction` takes the place of the style's
    last line, for prompts in another language; "plain" and "mmmu" have none that it could replace.

    Raises DataError, with the question's id, for an empty question or (where wanted) an empty answer, for
    "letter" without choices, and for an image marker within the text.
    """
    if style not in STYLES:
        raise DataError(f"unknown prompt style {style!r}; there are {', '.join(STYLES)}")
    if ocr and style != "short":
        raise DataError(f"OCR tokens go with the prompt style 'short', not {style!r}")
    if not question.question.strip():
        raise DataError(f"question {question.id!r} has no text")
    text, places = _with_places(question, _prompt(question, style, ocr, instruction))
    turns = [Turn("user", text, len(question.images), places)]
    if with_answer:
        turns.append(Turn("assistant", _answer(question, style)))
    return Sample(question.id, question.images, tuple(turns), {"question": question})


def by_letter(question: Question, style: str) -> bool:
    """Whether the answer to a question asked in this style is the letter of a choice."""
    return style == "letter" or (style == "mmmu" and bool(question.choices))


def letter_of(index: int) -> str:
    """The letter of a choice, counted from 0. Raises DataError beyond Z."""
    if not 0 <= index < len(ascii_uppercase):
        raise DataError(f"choice {index} has no letter; there are {len(ascii_uppercase)}")
    return ascii_uppercase[index]


def _prompt(question: Question, style: str, ocr: bool, instruction: str | None) -> str:
    if style == "mmmu":
        text = _mmmu(question)
    elif style == "plain":
        text = question.question
    else:
        text = "\n".join(_lines(question, style, ocr, instruction))
    return text


def _with_places(question: Question, text: str) -> tuple[str, tuple[int, ...]]:
    """The prompt without markers of pictures, and where these stood (see `mmkd.towers.samples.Turn`).

    Raises DataError unless there are none, or as many as the question has pictures.
    """
    if IMAGE_MARKER not in text:
        return text, ()
    check_markers(f"question {question.id!r}", text, (), len(question.images))
    text, _, places = placed(text)
    return text, places


def _lines(question: Question, style: str, ocr: bool, instruction: str | None) -> list[str]:
    lines = [f"Context: {question.hint}"] if question.hint else []
    lines.append(question.question)
    if style == "letter":
        if not question.choices:
            raise DataError(f"question {question.id!r} has no choices; the prompt style 'letter' needs them")
        lines += [f"{letter_of(i)}. {choice}" for i, choice in enumerate(question.choices)]
    if ocr:
        lines.append(f"Reference OCR token: {', '.join(question.ocr_tokens)}")
    lines.append(instruction or (LETTER_INSTRUCTION if style == "letter" else SHORT_INSTRUCTION))
    return lines


def _mmmu(question: Question) -> str:
    options = "".join(f"({letter_of(i)}) {choice}\n" for i, choice in enumerate(question.choices))
    parts = [question.question, options, LETTER_INSTRUCTION] if options else [question.question, SHORT_INSTRUCTION]
    return "\n\n".join(parts)


def _answer(question: Question, style: str) -> str:
    if by_letter(question, style):
        index, count = question.answer_index, len(question.choices)
        if index is None or not 0 <= index < count:
            raise DataError(f"question {question.id!r} has the answer index {index} among {count} choices")
        return letter_of(index)
    if not question.answer.strip():
        raise DataError(f"question {question.id!r} has no answer; it cannot be trained on")
    check_markers(f"question {question.id!r}", "", (question.answer,), 0)
    return question.answer
