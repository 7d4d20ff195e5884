"""Letters of choices: LLaVA's strict rule, and what a human reader would take from a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.evaluation.metric import Parser
from mmkd.evaluation.results import group_of
from mmkd.evaluation.statistics import interval
from mmkd.registry import register

LETTERS = "ABCDE"  # ScienceQA has two to five choices

# The trailing dot is a wildcard in LLaVA's own pattern: one more character is needed, any but a line break.
_STRICT = re.compile(r"The answer is ([A-Z]).")

# A lone capital B to E stands for a choice; "A" and small letters are words too, so they need a delimiter
# after them.
_LETTER = r"(?:([B-E])(?![\w'])|([Aa-e])(?=\s*(?:[).:,;!\]。](?!\w)|\n|$)))"
_LEADING = re.compile(r"(?:option|choice)?\s*[(\[]?" + _LETTER)
_STATED = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(?i:option|choice)?\s*[(\[]?" + _LETTER)
_DECORATION = re.compile(r"</?s>|<\|[^|<>]*\|>|[*_`\"]")


def scienceqa_parse(text: str | None, num_choices: int) -> str | None:
    """The letter by LLaVA's strict rule (`llava/eval/eval_science_qa.py`), or None where it says FAILED.

    Accepted are exactly: a bare capital letter A to E without any white space; such a letter followed by a
    period and a space; or one single occurrence of "The answer is X" followed by any one character.
    Quirks kept: " A", "A.", "(A)" and "a" fail; "The answer is AB." is A; a stated answer found twice
    fails, even when it is the same both times.

    As in the official code `num_choices` does not limit the letter: "D" of two choices is parsed, and wrong.
    `scienceqa_index` makes -1 of it.
    """
    if text is None:
        return None
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    stated = _STRICT.findall(text)
    return stated[0] if len(stated) == 1 else None


def scienceqa_index(letter: str | None, num_choices: int) -> int:
    """The position of a letter among the first `num_choices` letters (and never beyond E), else -1."""
    allowed = LETTERS[:num_choices]
    return allowed.index(letter) if letter is not None and letter in tuple(allowed) else -1


def scienceqa_parse_lenient(text: str | None, num_choices: int, choices: Sequence[str] = ()) -> str | None:
    """The letter a human reader would take from the text, or None; never the headline.

    In this order, special tokens and markdown marks being removed from 2. on:
    1. what the strict rule finds;
    2. the text is one of the `choices`, word for word (case and a final period do not matter);
    3. "answer is X", "Answer: (X)", "option X": all that are stated must agree;
    4. a letter at the head: "(B) dog", "B: dog", "b.", "B Because ...".
    Small letters, and "A" (an article), count only with a delimiter or the end after them.  A letter beyond
    `num_choices` is None.
    """
    if text is None:
        return None
    clean = _DECORATION.sub("", text).strip()
    letter = scienceqa_parse(text, num_choices) or _choice_letter(clean, choices) or _found_letter(clean)
    return letter if scienceqa_index(letter, num_choices) >= 0 else None


class StrictLetters(Parser):
    """A rule that takes letters only as its authors' script does; the score by a reader's rule stands beside it."""

    has_lenient = True

    def lenient(self, text: str, choices: Sequence[str]) -> str | None:
        return letter(text, choices)

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        mean, low, high = interval([row["score_lenient"] for row in rows], [group_of(row) for row in rows])
        return {"score_lenient": mean, "ci95_lenient": [low, high]}


@register("parsers", "letter")
def letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that a human reader would take from the text."""
    return scienceqa_parse_lenient(text, len(choices), choices)


def _choice_letter(text: str, choices: Sequence[str]) -> str | None:
    wanted = text.casefold().rstrip(".")
    matches = [i for i, choice in enumerate(choices) if choice.strip().casefold().rstrip(".") == wanted]
    return LETTERS[matches[0]] if wanted and len(matches) == 1 and matches[0] < len(LETTERS) else None


def _found_letter(text: str) -> str | None:
    stated = {(first or second).upper() for first, second in _STATED.findall(text)}
    if stated:
        return stated.pop() if len(stated) == 1 else None
    head = _LEADING.match(text)
    return (head[1] or head[2]).upper() if head else None
