"""The answers of a preference set that were not preferred: what a teacher makes of bad answers, too (DCKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mmkd.answers import Asked, GeneratedAnswers
from mmkd.data.preference import rejected_of
from mmkd.errors import DataError
from mmkd.registry import register
from mmkd.towers.tower import Tower


@register("answers", "rejected")
class RejectedAnswers(GeneratedAnswers):
    """The rejected answer of each pair of `format: preference`, beside the chosen one (DCKD, arXiv 2502.17927).

    The chosen answers are those of the data (`positions: given`), the rejected ones stand where generated ones do
    (`positions: generated`); no term takes their tokens for right.
    """

    of_pairs: ClassVar[bool] = True

    beside: bool = True

    def answer(self, student: Tower, asked: Sequence[Asked]) -> list[list[int]]:
        if self.samples != 1:
            raise DataError(f"answers: rejected has one answer to a prompt, not samples: {self.samples}")
        others = [rejected_of(one.sample) for one in asked]
        return [list(student.answer_tokens(other, other.answer)) for other in others]
