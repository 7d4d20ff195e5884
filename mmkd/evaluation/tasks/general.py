"""Scores and parsers that belong to no benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from mmkd.registry import register


@register("metrics", "accuracy")
def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction is a reference, character for character: for letters of choices."""
    return float(prediction in references)


@register("metrics", "exact_match")
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals a reference but for case and white space (runs count as one space)."""
    answer = " ".join(prediction.split()).casefold()
    return float(any(answer == " ".join(reference.split()).casefold() for reference in references))


@register("parsers", "identity")
def identity(text: str) -> str:
    """The text without the white space around it."""
    return text.strip()
