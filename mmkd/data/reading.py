"""What several formats do with a row: choices and letters, answers, names of pictures, ids that repeat, markers in a text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from mmkd.data.annotations import Row, shown
from mmkd.data.lazy import is_lazy
from mmkd.data.samples import IMAGE_MARKER, ImageRef, Question, Sample
from mmkd.data.source import Source
from mmkd.errors import DataError

_DISTANT = re.compile(r"(?:https?|ftp|s3|gs|hf)://|data:", re.IGNORECASE)  # web addresses, and pictures within the text
LETTERS = ascii_uppercase  # one a choice

# ---- choices and answers -----------------------------------------------------------------------------------------------


def choices_of(row: Row, key: str = "choices") -> list[str]:
    """The choices of a row. Raises DataError for more than there are letters, and fewer than two."""
    choices = row.texts(key)
    _check_count(row, choices)
    return choices


def _check_count(row: Row, choices: list[str]) -> None:
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{row.where}: {len(choices)} choices; 2 to {len(LETTERS)} are expected")


def choice_index(row: Row, key: str, count: int) -> int:
    """The number of a choice, counted from 0. Raises DataError."""
    index = row.integer(key)
    if not 0 <= index < count:
        raise DataError(f"{row.where}: key {key!r} is {index}, there are {count} choices (counted from 0)")
    return index


def letter_index(row: Row, key: str) -> int:
    """The number of the choice whose letter the row has. Raises DataError."""
    letter = row.text(key).strip()
    if len(letter) != 1 or letter not in LETTERS:
        raise row.wrong(key, "a capital letter")
    return LETTERS.index(letter)


def choice_question(row: Row, name: str, choices: list[str], answer: int | None, **fields: Any) -> Question:
    """A multiple-choice question; `answer` is None in a split without answers. Raises DataError."""
    _check_count(row, choices)
    if answer is not None and not 0 <= answer < len(choices):
        raise DataError(f"{row.where}: the answer is choice {answer} (counted from 0) of {len(choices)}")
    given = (choices[answer],) if answer is not None else ()
    return Question(
        id=name, answer="".join(given), references=given, choices=tuple(choices), answer_index=answer, **fields
    )


def free_question(name: str, references: tuple[str, ...], **fields: Any) -> Question:
    """A question that is answered in words; no references in a split without answers."""
    return Question(id=name, answer=references[0] if references else "", references=references, **fields)


def answer_texts(row: Row, key: str = "answers") -> tuple[str, ...]:
    """The texts of a list of {"answer": text}, in order; () where the key is missing, as in test splits."""
    if not row.has(key):
        return ()
    entries = row.list_of(key, dict, "objects")
    return tuple(Row(value, f"{row.where} {key} {number}").text("answer") for number, value in enumerate(entries))


def asked_and_answered(name: str, row: Row, images: tuple[ImageRef, ...]) -> Question:
    """A question of a row of {"question", "answer"}. Raises DataError where these are no text."""
    where = row.where
    texts = {key: row.get(key) if row.has(key) else None for key in ("question", "answer")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if wrong:
        raise DataError(f"{where}: {' and '.join(wrong)} must be text, as in {json.dumps({'question': '?', 'answer': '!'})}")
    check_markers(where, texts["question"], (texts["answer"],), len(images))
    return Question(id=name, question=texts["question"], images=images, answer=texts["answer"])


# ---- pictures ----------------------------------------------------------------------------------------------------------


def image_names(row: Row) -> list[str]:
    """`image` (a name or a list of names) or `images` (a list); none where both are absent, null or "".

    Raises DataError, also for web addresses and pictures that are written into the row.
    """
    if row.has("image") and row.has("images"):
        raise DataError(f"{row.where}: both 'image' and 'images'; one of them names the pictures")
    key = "images" if row.has("images") else "image"
    if not row.has(key):
        return []
    names = row.texts(key) if isinstance(row.get(key), list) else [row.text(key)]
    if "" in names and len(names) > 1:
        raise DataError(f"{row.where}: key {key!r} holds an empty name among others; leave it out")
    if distant := next((name for name in names if _DISTANT.match(name)), None):
        raise DataError(f"{row.where}: key {key!r} is {shown(distant)}, no file; save the pictures and give their names")
    return [name for name in names if name]


def named_images(source: Source, row: Row) -> tuple[ImageRef, ...]:
    """The pictures of `image_names`."""
    return tuple(source.image(name, where=row.where) for name in image_names(row))


def check_markers(where: str, question: str, answers: Sequence[str], images: int) -> None:
    """Raises DataError for markers <image> in answers, and in a question that has not as many pictures as markers."""
    if any(IMAGE_MARKER in answer for answer in answers):
        raise DataError(f"{where}: an answer holds the marker {IMAGE_MARKER}; only questions show pictures, delete it")
    marked = question.count(IMAGE_MARKER)
    if marked and marked != images:
        raise DataError(
            f"{where} holds the marker {IMAGE_MARKER} in its text, {marked} times, and has {images} pictures; delete it: without "
            "markers pictures stand at the head of the prompt by themselves, with one for each they keep their places"
        )


def refuse_unseen(row: Row) -> None:
    """Raises DataError for a row with a video or a sound, of which a model would see nothing."""
    for kind, what in (("video", "video"), ("audio", "sound")):
        for key in (kind, f"{kind}s", f"{kind}_path", f"{kind}_paths"):
            if row.has(key) and row.get(key):
                raise DataError(f"{row.where}: key {key!r} names a {what}; {what} is not supported")


# ---- conversations -----------------------------------------------------------------------------------------------------


def numbered(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Later samples of an id get "#2", "#3" ... appended; those of a large file, which nobody has all read, keep theirs."""
    if is_lazy(samples):
        return samples
    seen: Counter[str] = Counter()
    found = []
    for sample in samples:
        seen[sample.id] += 1
        found.append(sample if seen[sample.id] == 1 else replace(sample, id=f"{sample.id}#{seen[sample.id]}"))
    return found


def marks_picture(text: str) -> bool:
    """Whether a text begins or ends with the marker of a picture; within a text the word may be a word."""
    return text.strip().startswith(IMAGE_MARKER) or text.strip().endswith(IMAGE_MARKER)


def placed(text: str) -> tuple[str, int, tuple[int, ...]]:
    """A turn's text without the markers <image>, how many there are, and where they stand in what is left (see `Turn`).

    Pictures whose markers all stand at the start or the end of the text come at the head: no places.
    """
    count = text.count(IMAGE_MARKER)
    text = text.strip()
    head = tail = 0
    while text.startswith(IMAGE_MARKER):
        text, head = text[len(IMAGE_MARKER) :].lstrip(), head + 1
    while text.endswith(IMAGE_MARKER):
        text, tail = text[: -len(IMAGE_MARKER)].rstrip(), tail + 1
    first, *others = text.split(IMAGE_MARKER)
    if not others:
        return text, count, ()
    places = [0] * head
    whole = first
    for piece in others:
        places.append(len(whole))
        whole += piece
    return whole, count, (*places, *[len(whole)] * tail)
