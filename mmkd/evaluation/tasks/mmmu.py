"""MMMU: letters and open answers by the authors' rules (MMMU-Benchmark/MMMU, `eval_utils.py`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mmkd.data.samples import Question
from mmkd.evaluation.metric import Metric, aggregate_of_format
from mmkd.evaluation.tasks.letters import StrictLetters, letter
from mmkd.registry import register

_MMMU_MARKS = ",.!?;:'"
_MMMU_WORDS = 5  # shorter answers are not searched for the words of a choice


@register("parsers", "mmmu")
class MMMUAnswers(StrictLetters):
    """Letters and open answers by MMMU's own rule; the score by a reader's rule for letters stands beside it."""

    def parse(self, text: str, choices: Sequence[str]) -> str | None:
        return mmmu_parse(text, choices)

    def lenient(self, text: str, choices: Sequence[str]) -> str | None:
        found = mmmu_parse(text, choices)
        return letter(text, choices) if found is None else found


def mmmu_parse(text: str, choices: Sequence[str]) -> str | None:
    """MMMU's own rule (`eval_utils.py`): for multiple choice the letter, for an open question the text.

    "(B)" before " B " before, in answers of more than five words, a choice's own words; of several the one that comes
    last. Where nothing is found the official code guesses at random; here it is None, and `mmmu` in the results adds what
    guessing would give on average.
    """
    if not choices:
        return text
    for mark in _MMMU_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[: len(choices)]
    found = {letter: text.rfind(f"({letter})") for letter in letters}
    if max(found.values()) < 0:
        found = {letter: text.rfind(f" {letter} ") for letter in letters}
    if max(found.values()) < 0 and len(text.split()) > _MMMU_WORDS:
        low = text.lower()
        found = {letter: low.rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    best = max(found, key=found.__getitem__)  # the first of equals, as with numpy's argmax
    return best if found[best] >= 0 else None


_MMMU_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_TRIVIAL = frozenset(":,.!?;'")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _mmmu_normalise(text: str) -> list[str | float]:
    """A number rounded to two places, or the lower-case text; of one character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mmmu_candidates(response: str) -> list[str | float]:
    """The parts of a response that may be its answer, and the numbers in them."""
    response = response.strip().strip(".").lower()
    # The official pattern also splits before capitals, of which there are none left.
    parts = response.split("\n")
    keys = []
    for number, part in enumerate(parts):
        marks = _MMMU_KEYS + (("=",) if number == len(parts) - 1 else ())
        tails = [part.split(mark)[-1].strip() for mark in marks if mark in part]
        shortest = _first_shortest(tails)
        if shortest and shortest not in _MMMU_TRIVIAL:
            keys.append(shortest)
    keys = keys or [response]
    numbers = [found for key in keys for pattern in _MMMU_NUMBERS for found in pattern.findall(key)]
    return [value for text in keys + numbers for value in _mmmu_normalise(text)]


def _first_shortest(tails: Sequence[str]) -> str:
    """As the official loop takes it: an empty tail is replaced by the next one, however long."""
    best = ""
    for tail in tails:
        best = tail if not best or len(tail) < len(best) else best
    return best


def mmmu_open(prediction: str, references: Sequence[str]) -> float:
    """MMMU's open questions (`eval_utils.py`): 1.0 when a reference stands in a part that may be the answer, or equals
    a number in it."""
    wanted = [value for reference in references for value in _mmmu_normalise(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    for found in _mmmu_candidates(prediction):
        if found in wanted if isinstance(found, float) else any(text in found for text in texts):
            return 1.0
    return 0.0


@register("metrics", "mmmu_open")
class MMMU(Metric):
    """MMMU's scores: letters of choices as they are, open questions by `mmmu_open`."""

    def score(self, answer: str, question: Question) -> float:
        if question.choices:
            return float(answer in question.references)
        return mmmu_open(answer, question.references)


@aggregate_of_format("mmmu")
def mmmu_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MMMU's score as it would be on average if unparsed letters were guessed, as the authors' code does."""
    guessed = [1 / len(row["choices"]) if row["parsed"] is None and row["choices"] else row["score"] for row in rows]
    return {"mmmu": {"expected_with_guessing": math.fsum(guessed) / len(guessed)}}
