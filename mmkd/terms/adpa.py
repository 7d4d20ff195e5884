"""The advantage of an aligned teacher over the same one before its alignment, on the student's own answers (ADPA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.engine.rows import RowTerm, row_losses
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm
from mmkd.terms.mixture import TeacherMixture, teacher_arguments
from mmkd.terms.own_answers import OnOwnAnswers
from mmkd.terms.signals import Signals


@register("terms", "adpa")
@dataclass(frozen=True)
class AdvantagePreference(OnOwnAnswers, LogitTerm):
    """Minus the student's expected advantage: log p of an aligned teacher minus that of the same before its alignment."""

    example: ClassVar[Mapping[str, Any]] = {"reference": "a"}
    origin: ClassVar[str] = "ADPA (arXiv 2502.17927)"
    status: ClassVar[str] = "confirmed; our choice: answers of the student as it is, no penalty and no importance weight"
    memory_factor: ClassVar[int] = 6

    reference: str = ""  # the name of the teacher before its alignment; the term's `teacher` is the aligned one

    @property
    def several(self) -> tuple[str, ...]:
        return (self.place.teacher or "", self.reference)

    def errors(self) -> list[str]:
        found = [] if self.reference else ["reference: name the teacher before its alignment, and the aligned one as `teacher`"]
        if self.positions != "generated":
            found.append("adpa learns from answers that the student gave itself; use positions: generated")
        return found

    check = TeacherMixture.check

    def loss(self, signals: Signals) -> Tensor:
        total = signals.zero
        for name, sign in zip(self.several, (1.0, -1.0), strict=True):
            view = signals.of(name)
            rows = view["student.rows"]
            if not len(rows.targets):
                return rows.student.sum() * 0.0
            term = RowTerm(name, sign, expected_cost(), True)
            options = {"vocabulary": view.vocabulary, "chunk_bytes": signals.chunk_bytes}
            given = (rows.student, rows.student_head, rows.targets)
            total = total + row_losses(*given, [term], **teacher_arguments(view, rows), **options)[0]
        return total


def expected_cost() -> Callable[..., Tensor]:
    """-sum q log p: what a token that the student draws costs under a teacher. [r, V], [r, V], [r] -> [r]"""

    def loss(student: Tensor, teacher: Tensor, _targets: Tensor) -> Tensor:
        return -(student.softmax(-1) * torch.log_softmax(teacher, -1)).sum(-1)

    return loss
