"""Checks of numbers: the scores that an answer gives, and the counts and places that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check


@register("checks", "gap")
@dataclass
class Gap(Check):
    """Keeps answers in which one number is at least so much above another: an assessor's two scores (CoMD).

    more, less: keys of what the form read, each a number from `low` to `high`.  at_least, at_most: of more - less.
    """

    more: str = "teacher"
    less: str = "student"
    at_least: float = 1.0
    at_most: float | None = None
    low: float = 1.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least is {self.at_least}, above at_most {self.at_most}")
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, not below high {self.high}")

    def refuse(self, one: Candidate) -> str | None:
        found = [one.written.get(key) if isinstance(one.written, dict) else None for key in (self.more, self.less)]
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in found):
            return "lacks a number"
        if not all(self.low <= value <= self.high for value in found):
            return f"a number outside {self.low:g} to {self.high:g}"
        gap = found[0] - found[1]
        one.notes["gap"] = round(gap, 4)
        if gap < self.at_least:
            return "gap too small"
        return "gap too large" if self.at_most is not None and gap > self.at_most else None


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()
_VALUES = {word: float(value) for value, word in enumerate(_WORDS)}
# A sign belongs to a number that stands behind no letter or digit, so that "3-5" has two and "-5" is one.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})+(?:\.\d+)?|(?<![\w.])-?\d+(?:\.\d+)?|\d+(?:\.\d+)?")


def numbers_in(text: str) -> set[float]:
    """The numbers of a text, in digits ("1,200", "-3.5") and in English words up to twenty. "one" is often no number, and
    is left out."""
    found = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    return found | {_VALUES[word] for word in re.findall(r"[a-z]+", text.casefold()) if word in _VALUES and word != "one"}


@register("checks", "numbers")
@dataclass
class Numbers(Check):
    """Texts whose numbers all stand in what the data tell, such as a program's trace (CodePercept).

    told: the key of `told`.  of: the texts that are looked at.  least: so many numbers a text must have.
    """

    told: str = "trace"
    of: tuple[Literal["question", "answer"], ...] = ("answer",)
    least: Annotated[int, Field(ge=0)] = 0

    def refuse(self, one: Candidate) -> str | None:
        if not one.question.told.get(self.told):
            return f"the data tell no {self.told}"
        known = numbers_in(one.question.told[self.told])
        for name in self.of:
            said = numbers_in(one.row[name])
            if said - known:
                return f"{name} has a number that is not in {self.told}"
            if len(said) < self.least:
                return f"{name} has too few numbers"
        return None
