"""A-OKVQA's direct answers."""

from __future__ import annotations

from collections.abc import Sequence

from mmkd.registry import register


@register("metrics", "aokvqa_accuracy")
def aokvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """A-OKVQA's direct answers: min(1, equal references / 3), strings compared as they are."""
    return min(1.0, list(references).count(prediction) / 3)
