"""Answers in words, and by letter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question
from mmkd.registry import register
from mmkd.writing.forms import Form, FormError


@register("forms", "plain")
@dataclass(frozen=True)
class Plain(Form):
    """Any text; with `after`, what stands behind the last of these words, such as "Answer:"."""

    after: str = ""
    one_line: bool = False  # whether more than one line is refused

    def read(self, text: str, question: Question) -> str:
        if self.after:
            _, found, text = text.rpartition(self.after)
            if not found:
                raise FormError(f"has no {self.after!r}")
            text = text.strip()
            if not text:
                raise FormError(f"has nothing behind {self.after!r}")
        if self.one_line and "\n" in text:
            raise FormError("has several lines")
        return text


@register("forms", "reasoned")
@dataclass(frozen=True)
class Reasoned(Form):
    """A rationale and, behind the last `after`, the answer: {rationale, answer}."""

    after: str = "Answer:"

    def read(self, text: str, question: Question) -> dict[str, str]:
        before, found, behind = text.rpartition(self.after)
        if not found:
            raise FormError(f"has no {self.after!r}")
        if not before.strip() or not behind.strip():
            raise FormError("has no rationale" if behind.strip() else f"has nothing behind {self.after!r}")
        return {"rationale": before.strip(), "answer": behind.strip()}

    def keys(self) -> tuple[str, ...]:
        return ("rationale", "answer")


@register("forms", "letter")
@dataclass(frozen=True)
class Letter(Form):
    """The letter of one of the question's choices, alone or as "B.", "(B)" or "B. its text"; gives the choice's text."""

    def read(self, text: str, question: Question) -> str:
        found = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]?\s*(.*))?", text, re.DOTALL)
        letters = {letter_of(number): choice for number, choice in enumerate(question.choices)}
        if not letters:
            raise FormError("is asked by letter, but its question has no choices")
        if found is None or found[1].upper() not in letters:
            raise FormError("is no letter of a choice")
        choice = letters[found[1].upper()]
        if found[2] and found[2].strip().rstrip(".").casefold() != choice.strip().rstrip(".").casefold():
            raise FormError("is no letter of a choice")
        return choice


@register("forms", "yes_no")
@dataclass(frozen=True)
class YesNo(Form):
    """yes or no, alone."""

    def read(self, text: str, question: Question) -> str:
        word = text.strip(" .!\"'").casefold()
        if word not in ("yes", "no"):
            raise FormError("is neither yes nor no")
        return word
