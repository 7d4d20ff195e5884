"""CHAIR: which of the objects that a description names are not in the picture (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.coco import NO_OBJECT, mentions
from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.metric import Metric
from mmkd.evaluation.results import answer_of
from mmkd.registry import register


@register("metrics", "chair")
class CHAIR(Metric):
    """1.0 for a description without a made-up object; CHAIR_s, CHAIR_i and recall of what was described stand beside it."""

    def score(self, answer: str, question: Question) -> float:
        return unhallucinated(answer, question.references)

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        described = [row for row in rows if answer_of(row) is not None]
        if not described:
            return {}
        return {"chair": chair([answer_of(row) for row in described], [row["references"] for row in described])}


def unhallucinated(text: str, references: Sequence[str]) -> float:
    """1.0 when every object that the text names is among the references, also when it names none; else 0.0."""
    return float(set(mentions(text)) <= set(references))


def chair(predictions: Sequence[str], objects: Sequence[Sequence[str]]) -> dict[str, float]:
    """CHAIR of descriptions; `objects` are those of each one's picture (NO_OBJECT counts as none).

    chair_s   share of the descriptions that name an object which is not there
    chair_s_named   the same among those that name any object: Object HalBench's rate by response
    chair_i   share of all mentions that are of such objects: its rate by mention
    recall    share of the pictures' objects that are named
    mentions, named   how many mentions, and descriptions with any, there are
    Rates are 0.0 where nothing was named. Raises DataError for lengths that differ and for nothing to score.
    """
    if not predictions or len(predictions) != len(objects):
        raise DataError(f"chair: {len(predictions)} descriptions of {len(objects)} pictures; give one of each, at least one")
    said = [mentions(text) for text in predictions]
    there = [set(names) - {NO_OBJECT} for names in objects]
    wrong = [sum(name not in known for name in named) for named, known in zip(said, there, strict=True)]
    count, named = sum(map(len, said)), sum(map(bool, said))
    all_there, bad = sum(map(len, there)), sum(map(bool, wrong))
    found = sum(len(known & set(names)) for names, known in zip(said, there, strict=True))
    return {
        "chair_s": bad / len(said),
        "chair_s_named": bad / named if named else 0.0,
        "chair_i": sum(wrong) / count if count else 0.0,
        "recall": found / all_there if all_there else 0.0,
        "mentions": count,
        "named": named,
    }
