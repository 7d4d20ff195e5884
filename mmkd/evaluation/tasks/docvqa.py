"""DocVQA and its kin: the average normalised Levenshtein similarity, and the competition's file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.submission import Submission, number, submission
from mmkd.registry import register

THRESHOLD = 0.5  # similarities below it are 0


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, one row at a time."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], cost
    return row[-1]


@lru_cache(maxsize=65_536)
def _similarity(a: str, b: str) -> float:
    return 1 - _edit_distance(a, b) / max(len(a), len(b))


@register("metrics", "anls")
def anls(prediction: str, references: Sequence[str]) -> float:
    """The average normalised Levenshtein similarity of DocVQA, of one answer; 0 below a half.

    The formula of ST-VQA's and DocVQA's authors. Lower case and stripped, inner spaces as they are; the best similarity over
    the references, 0 below 0.5 (which itself counts). The evaluator of MP-DocVQA is followed where others differ or fail: an
    empty prediction scores 0, even against an empty reference. It is not followed in this: there "none" means "there is no
    answer" and scores 0. All questions here have an answer, and "none" may be what a form says; so it is a word like others,
    as for pix2struct, ST-VQA and lmms-eval.
    Raises DataError when there is no reference.
    """
    if not references:
        raise DataError("anls needs at least one reference, got none; give the question an answer")
    answer = prediction.lower().strip()
    if not answer:
        return 0.0
    wanted = [reference.lower().strip() for reference in references]
    if answer in wanted:
        return 1.0
    # The similarity is at most shorter / longer: what cannot reach the threshold by its length is not compared.
    near = [text for text in wanted if min(len(text), len(answer)) >= THRESHOLD * max(len(text), len(answer))]
    best = max((_similarity(answer, text) for text in near), default=0.0)
    return best if best >= THRESHOLD else 0.0


@submission("docvqa")
class DocVQA(Submission):
    """The Robust Reading Competition's file for DocVQA."""

    def row(self, prediction: str, question: Question) -> dict[str, Any]:
        return {"questionId": number(question.id), "answer": prediction.strip()}
