"""The teacher's few likeliest tokens, with calibrated probabilities (FIRST): from a live teacher or a top-k cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmkd import losses
from mmkd.registry import register
from mmkd.teachers.teacher import Gives
from mmkd.terms.signals import Signals
from mmkd.terms.term import RowTerm


@dataclass(frozen=True)
class OfTopTokens:
    """The loss on what a top-k cache keeps (ids and log-probabilities, likeliest first), else on a live teacher's logits."""

    loss: losses.FIRST

    def __call__(self, student: Tensor, teacher: Tensor | None, targets: Tensor, *kept: Tensor) -> Tensor:
        return self.loss(student, None, targets, *self.top(teacher, kept))

    def value_and_grad(self, student, teacher, targets, shared=None, *kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.value_and_grad(student, None, targets, shared, *self.top(teacher, kept))

    def top(self, teacher: Tensor | None, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return kept[:2] if kept else teacher.log_softmax(-1).topk(self.loss.k, dim=-1)[::-1]


@register("terms", "first")
@dataclass(frozen=True)
class FIRST(RowTerm):
    """Forward KL on the teacher's k likeliest tokens alone; `mmkd.losses.calibrated_c` finds its c."""

    origin: ClassVar[str] = "FIRST (arXiv 2408.12168) and its released code"
    status: ClassVar[str] = "confirmed; our choice: how the other entry and label smoothing are done"
    memory_factor: ClassVar[int] = 3

    c: float = 1.0
    k: int = 5
    normalise: Literal["softmax", "linear"] = "softmax"
    other: bool = False
    label_smoothing: float = 0.0
    student_temperature: float = 1.0
    epsilon: float = 1e-6

    def row_loss(self, signals: Signals | None = None) -> OfTopTokens:
        options = (self.c, self.k, self.normalise, self.other, self.label_smoothing, self.student_temperature, self.epsilon)
        return OfTopTokens(losses.FIRST(*options))

    def top_k_loss(self) -> OfTopTokens:
        return self.row_loss()

    def refusal(self, gives: Gives) -> str | None:
        few = gives.top_k is not None and gives.top_k < self.k
        why = f"{self.kind} reads the {self.k} likeliest tokens, {gives.name} has {gives.mode}; write it anew or lower k"
        return super().refusal(gives) or (why if few else None)
