"""ChartQA: numbers within five per cent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.samples import Question
from mmkd.evaluation.metric import Metric
from mmkd.evaluation.tasks.yes_no import neither_share, yes_or_no
from mmkd.registry import register

TOLERANCE = 0.05

_YES_NO = ("yes", "no")
_STATED = re.compile(r"(?:so,?\s+|therefore,?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is|\s*:)\s*:?\s*", re.IGNORECASE)
_AROUND = " \t\n.!*_`\"'"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


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


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (pix2struct, `metrics.py`): numbers within 5 % of a reference, words equal.

    Quirks kept: "5%" is 0.05; "1,000" is no number; a target of 0 needs the same string; case does not
    matter.
    """
    return float(any(_relaxed_match(prediction, target) for target in references))


@register("metrics", "relaxed_accuracy")
class RelaxedAccuracy(Metric):
    """ChartQA's relaxed accuracy; a reader's score stands beside it."""

    has_lenient = True

    def score(self, answer: str, question: Question) -> float:
        return relaxed_accuracy(answer, question.references)

    def score_lenient(self, answer: str, question: Question) -> float:
        return relaxed_accuracy_lenient(answer, question.references)

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        asked = [row for row in rows if any(reference.lower() in _YES_NO for reference in row["references"])]
        return {"neither_share": neither_share(asked)} if asked else {}


def relaxed_accuracy_lenient(prediction: str, references: Sequence[str]) -> float:
    """1.0 where `relaxed_accuracy` gives it, and where only the form differs, as for "Yes." or "1,200"; never the headline.

    "The answer is", marks around the answer, currencies, per cent signs and commas between thousands do not count, nor what
    follows the word where a reference is yes or no.
    """
    return float(any(_lenient_match(prediction, target) for target in references))


def _lenient_match(prediction: str, target: str) -> bool:
    if _relaxed_match(prediction, target):
        return True
    if target.lower() in _YES_NO:
        return yes_or_no(prediction) == target.lower()
    said, wanted = _plain(prediction), _plain(target)
    return _relaxed_match(said, wanted) or _to_number(said) == 0.0 == _to_number(wanted)


def _plain(text: str) -> str:
    text = text.strip(_AROUND)
    stated = _STATED.match(text)
    text = text[stated.end() :] if stated else text
    return _THOUSANDS.sub("", text.strip(_AROUND + "$€£¥")).rstrip("% ")
