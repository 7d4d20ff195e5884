"""Several teachers, the surer ones more (CA-MKD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmkd.registry import register
from mmkd.terms.mixture import TeacherMixture, entropies, target_log_probs
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows


@register("terms", "confident_teachers")
@dataclass(frozen=True)
class ConfidentTeachers(TeacherMixture):
    """A divergence to several teachers, the more to each the smaller its cross-entropy on the answer (or its entropy)."""

    example: ClassVar[Mapping[str, Any]] = {"teachers": ["a", "b"]}
    origin: ClassVar[str] = "CA-MKD (arXiv 2201.00007), eq. 4"
    status: ClassVar[str] = "our choice: formula (recalled), a token as the sample, entropy where answers are the student's own"

    by: Literal["answer", "entropy"] = "answer"

    @property
    def learns_answers(self) -> bool:
        return self.by == "answer"

    def weights(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows]) -> Tensor:
        pairs = zip(views, rows, strict=True)
        cost = torch.stack([entropies(v, r) if self.by == "entropy" else -target_log_probs(v, r) for v, r in pairs])
        return confidence(cost)


def confidence(cost: Tensor) -> Tensor:
    """(1 - softmax of the costs) / (M - 1): adds up to 1 over the teachers. [M, R] -> [M, R]"""
    return (1 - cost.softmax(0)) / (len(cost) - 1)
