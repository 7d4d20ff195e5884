"""ChartQA: numbers within five per cent."""

from __future__ import annotations

from collections.abc import Sequence

from mmkd.registry import register

TOLERANCE = 0.05


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed_match(prediction: str, target: str) -> bool:
    predicted, wanted = _to_number(prediction), _to_number(target)
    if predicted is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(predicted - wanted) / abs(wanted) <= TOLERANCE


@register("metrics", "relaxed_accuracy")
def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (pix2struct, `metrics.py`): numbers within 5 % of a reference, words equal.

    Quirks kept: "5%" is 0.05; "1,000" is no number; a target of 0 needs the same string; case does not
    matter.
    """
    return float(any(_relaxed_match(prediction, target) for target in references))
