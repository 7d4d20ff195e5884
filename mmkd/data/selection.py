"""Which of a split's questions or samples are read, and which of several answers is trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from mmkd.data.annotations import shown
from mmkd.data.lazy import taken
from mmkd.data.samples import Question, Sample
from mmkd.errors import DataError

TARGETS = ("first", "majority", "sampled")

T = TypeVar("T")
Item = TypeVar("Item", Question, Sample)


def choose_target(target: str, seed: int, name: str, first: T, answers: Sequence[T]) -> T:
    """One of the answers to the question `name`; `first` is the one that the file gives first.

    target: "first"; "majority", the most common, of equally common ones the earliest; "sampled", drawn by `seed` and
    the question's name. Raises DataError for any other.
    """
    if target not in TARGETS:
        raise DataError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")
    if target == "first" or not answers:
        return first
    if target == "majority":
        # Counter keeps the order of appearance, so that the earlier of two equally common answers wins.
        return Counter(answers).most_common(1)[0][0]
    return random.Random(f"{seed} {name}").choice(answers)


def with_target(question: Question, target: str, seed: int) -> Question:
    """The question with one of its references as the answer that is trained; see `choose_target`."""
    if target == "first" or len(question.references) < 2:
        return question
    answer = choose_target(target, seed, question.id, question.answer, question.references)
    index = question.choices.index(answer) if question.choices else None
    return replace(question, answer=answer, answer_index=index)


def subset(items: Sequence[Item], limit: int | None, image_limit: int | None = None, seed: int = 0) -> Sequence[Item]:
    """A random part in the order of the file.

    image_limit: keep a random subset of so many pictures with all their questions, and the questions without a picture.
    limit: then keep a random subset of so many questions. Both follow from `seed`, and a smaller subset is part of a larger one.
    Raises DataError for a number below 1.
    """
    for name, value in (("limit", limit), ("image_limit", image_limit)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f"{name} is {value!r}; it must be a whole number of at least 1, or nothing for all")
    if image_limit is not None:
        numbers: dict[str, int] = {}
        pictures = [tuple(numbers.setdefault(ref.key, len(numbers)) for ref in item.images) for item in items]  # one reading
        order = list(range(len(numbers)))
        random.Random(f"images {seed}").shuffle(order)
        kept = set(order[:image_limit])
        items = taken(items, [i for i, own in enumerate(pictures) if kept.issuperset(own)])
    if limit is not None:
        order = list(range(len(items)))
        random.Random(f"questions {seed}").shuffle(order)
        items = taken(items, sorted(order[:limit]))
    return items


def refuse_duplicates(questions: Sequence[Question], where: str) -> None:
    """Raises DataError for two questions with one id; `where` they are from leads the message."""
    places: dict[str, int] = {}
    for place, question in enumerate(questions):
        first = places.setdefault(question.id, place)
        if first != place:
            raise DataError(
                f"{where}: questions {first} and {place} (counted from 0) have the same id {shown(question.id)}; "
                "ids must be unique"
            )
