"""SEED-Bench: the bare letter."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from mmkd.evaluation.tasks.letters import StrictLetters
from mmkd.registry import register


@register("parsers", "letter_exact")
class LetterExact(StrictLetters):
    """The text where it is a choice's letter and nothing else; the score by a reader's rule stands beside it."""

    def parse(self, text: str, choices: Sequence[str]) -> str | None:
        return letter_exact(text, len(choices))


def letter_exact(text: str, num_choices: int) -> str | None:
    """The text where it is one of the choices' letters and nothing else (LLaVA's rule for SEED-Bench)."""
    return text if len(text) == 1 and text in ascii_uppercase[:num_choices] else None
