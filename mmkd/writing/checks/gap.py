"""Answers that give scores: how far apart two of them are."""

from __future__ import annotations

from dataclasses import dataclass

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
