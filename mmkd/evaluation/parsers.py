"""From a model's words to an answer: one small function a benchmark.

The official rules are kept with their quirks, because a published number contains them.  A parser returns
None where the words hold no answer; the share of these is reported beside every score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase

from mmkd.evaluation.mathematics import math_answer

LETTERS = "ABCDE"  # ScienceQA has two to five choices

# The trailing dot is a wildcard in LLaVA's own pattern: one more character is needed, any but a line break.
_STRICT = re.compile(r"The answer is ([A-Z]).")

# A lone capital B to E stands for a choice; "A" and small letters are words too, so they need a delimiter
# after them.
_LETTER = r"(?:([B-E])(?![\w'])|([Aa-e])(?=\s*(?:[).:,;!\]。](?!\w)|\n|$)))"
_LEADING = re.compile(r"(?:option|choice)?\s*[(\[]?" + _LETTER)
_STATED = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(?i:option|choice)?\s*[(\[]?" + _LETTER)
_DECORATION = re.compile(r"</?s>|<\|[^|<>]*\|>|[*_`\"]")


def identity(text: str) -> str:
    """The text without the white space around it."""
    return text.strip()


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


def pope_parse(text: str) -> str:
    """Either "yes" or "no", by POPE's rule (`llava/eval/eval_pope.py`), which never fails.

    The words of the text up to the first period, split at single spaces, commas removed: "no" when "No",
    "no" or "not" is among them, else "yes".  So "" and "NO" and "yes\\nno" are "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_parse(text: str) -> str:
    """What MME's own tool finds in the first four characters: "yes", else "no", else "other"; any case."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def letter_exact(text: str, num_choices: int) -> str | None:
    """The text where it is one of the choices' letters and nothing else (LLaVA's rule for SEED-Bench)."""
    return text if len(text) == 1 and text in ascii_uppercase[:num_choices] else None


def gqa_parse(text: str) -> str:
    """Lower case without periods at the end (LLaVA, `convert_gqa_for_eval.py`)."""
    return text.rstrip(".").lower()


_MMMU_MARKS = ",.!?;:'"
_MMMU_WORDS = 5  # shorter answers are not searched for the words of a choice


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


# parser(text, choices) -> parsed text or None; the names are the values of `parser` in a benchmark's card.
PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "identity": lambda text, choices: identity(text),
    "scienceqa": lambda text, choices: scienceqa_parse(text, len(choices)),
    "pope": lambda text, choices: pope_parse(text),
    "mme": lambda text, choices: mme_parse(text),
    "letter": lambda text, choices: scienceqa_parse_lenient(text, len(choices), choices),
    "letter_exact": lambda text, choices: letter_exact(text, len(choices)),
    "gqa": lambda text, choices: gqa_parse(text),
    "mmmu": mmmu_parse,
    "math": math_answer,
}
