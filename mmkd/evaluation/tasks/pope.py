"""POPE: does a model say that things are there which are not?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.metric import Metric
from mmkd.evaluation.results import answer_of
from mmkd.evaluation.tasks.general import exact_match
from mmkd.evaluation.tasks.yes_no import YesNo, neither_share
from mmkd.registry import register


@register("parsers", "pope")
class POPEAnswers(YesNo):
    """POPE's own rule; the score by a reader's rule stands beside it."""

    def parse(self, text: str, choices: Sequence[str]) -> str:
        return pope_parse(text)


def pope_parse(text: str) -> str:
    """Either "yes" or "no", by POPE's rule (`llava/eval/eval_pope.py`), which never fails.

    The words of the text up to the first period, split at single spaces, commas removed: "no" when "No",
    "no" or "not" is among them, else "yes".  So "" and "NO" and "yes\\nno" are "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


@register("metrics", "pope")
class POPE(Metric):
    """Accuracy over "yes" and "no"; precision, recall, F1 and the share of "yes" stand beside it, by sampling too."""

    def score(self, answer: str, question: Question) -> float:
        return exact_match(answer, question.references)

    def hallucinated(self, answer: str | None, question: Question) -> float | None:
        """Where the truth is "no", "yes" is made up."""
        return float(answer == "yes") if question.references == ("no",) else None

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        return {"pope": pope_numbers(rows), "neither_share": neither_share(rows)}


def pope_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """POPE over all rows and by sampling; `f1_mean`, the mean of the samplings' F1, is what LLaVA prints."""
    samplings: dict[str, list[Mapping]] = {}
    for row in rows:
        samplings.setdefault(row["categories"].get("sampling", "all"), []).append(row)
    by = {name: _of_rows(part) for name, part in samplings.items()}
    return _of_rows(rows) | {"by_sampling": by, "f1_mean": math.fsum(part["f1"] for part in by.values()) / len(by)}


def _of_rows(rows: Sequence[Mapping]) -> dict[str, float]:
    return pope([answer_of(row) for row in rows], [row["references"][0] for row in rows])


def pope(predictions: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """POPE's numbers (`llava/eval/eval_pope.py`) with "yes" as the positive class.

    `predictions` are texts, parsed here by `pope_parse` ("yes" and "no" stay what they are), or None for what is no
    answer and always wrong; `labels` are "yes" or "no".  Precision, recall
    and f1 are 0.0 where their denominator is 0 (the official script divides by zero). Raises DataError on lengths that
    differ, on nothing to score, on an unknown label.
    """
    if len(predictions) != len(labels):
        raise DataError(f"pope: {len(predictions)} predictions for {len(labels)} labels; give one label a prediction")
    if not predictions:
        raise DataError("pope: there is nothing to score; give at least one prediction")
    unknown = sorted(set(labels) - {"yes", "no"})
    if unknown:
        raise DataError(f"pope: labels are 'yes' or 'no', got {unknown[:3]}; check the annotation file")
    parsed = [None if prediction is None else pope_parse(prediction) for prediction in predictions]
    pairs = list(zip(parsed, labels, strict=True))
    true_yes = pairs.count(("yes", "yes"))
    said_yes = sum(said == "yes" for said, _ in pairs)
    is_yes = sum(label == "yes" for _, label in pairs)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / is_yes if is_yes else 0.0
    return {
        "accuracy": sum(said == label for said, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }
