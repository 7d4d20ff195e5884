"""What several formats do with a row: choices and letters, answers, names of pictures, ids that repeat, markers in a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from string import ascii_uppercase
from typing import Any

from mmkd.data.annotations import Row
from mmkd.data.samples import IMAGE_MARKER, ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError

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


def asked_and_answered(name: str, row: Any, images: tuple[ImageRef, ...], where: str) -> Question:
    """A question of a row of {"question", "answer"}. Raises DataError where these are no text."""
    texts = {key: row.get(key) if isinstance(row, dict) else None for key in ("question", "answer")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if wrong:
        raise DataError(f"{where}: {' and '.join(wrong)} must be text, as in {json.dumps({'question': '?', 'answer': '!'})}")
    return Question(id=name, question=texts["question"], images=images, answer=texts["answer"])


# ---- pictures ----------------------------------------------------------------------------------------------------------


def image_names(row: Row) -> list[str]:
    """`image` (a name or a list of names) or `images` (a list); none where both are absent or null. Raises DataError."""
    if row.has("image") and row.has("images"):
        raise DataError(f"{row.where}: both 'image' and 'images'; one of them names the pictures")
    key = "images" if row.has("images") else "image"
    if not row.has(key):
        return []
    names = row.texts(key) if isinstance(row.get(key), list) else [row.text(key)]
    if "" in names:
        raise DataError(f"{row.where}: key {key!r} holds an empty name; leave the key out where there is no picture")
    return names


def named_images(source: Source, row: Row) -> tuple[ImageRef, ...]:
    """The pictures of `image_names`."""
    return tuple(source.image(name, where=row.where) for name in image_names(row))


# ---- conversations -----------------------------------------------------------------------------------------------------


def named_rows(rows: Iterable[Row], source: Source) -> Iterator[tuple[Row, str, tuple[ImageRef, ...]]]:
    """Each row with its id, to which later rows of an id get "#2", "#3" ... appended, and its pictures."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows):
        name = row.identifier("id", default=f"{source.split}-{number}")
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        yield row, unique, named_images(source, row)


def without_markers(text: str, where: str) -> str:
    """A turn's text without the markers <image> at its start and end. Raises DataError for one within the text."""
    text = text.strip()
    while text.startswith(IMAGE_MARKER):
        text = text[len(IMAGE_MARKER) :].lstrip()
    while text.endswith(IMAGE_MARKER):
        text = text[: -len(IMAGE_MARKER)].rstrip()
    if IMAGE_MARKER in text:
        raise DataError(f"{where}: {IMAGE_MARKER} in the middle of the text; put it at the start or the end")
    return text
