"""The teacher's rows of a batch carried into the student's (SinKD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm, both_logits, sampled_over_ranks
from mmkd.terms.signals import Signals


@register("terms", "sinkd")
@dataclass(frozen=True)
class SinKD(LogitTerm):
    """The cheapest way to carry the teacher's distributions of a batch into the student's (Sinkhorn distance); mean over rows.

    It couples rows: at most `rows` of a micro-batch, over all ranks together. Which they are depends on sample ids, places and
    progress alone, and rows of other ranks are gathered with gradient, so two processes give what one does. Micro-batches are
    couplings of their own: accumulation changes the loss, to the mean of theirs, weighted by rows.
    """

    origin: ClassVar[str] = "SinKD (arXiv 2402.17110) and its released code"
    status: ClassVar[str] = "confirmed; our choice: at most 256 rows, mean over rows, columns"

    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 20
    detach_plan: bool = False
    rows: int = 256
    columns: int | None = None  # how many of the teacher's likeliest tokens of each row are compared; None for all tokens

    def errors(self) -> list[str]:
        wrong = [] if self.rows > 0 else [f"rows is {self.rows}; it must be above 0"]
        wrong += [] if self.columns is None or self.columns > 0 else [f"columns is {self.columns}; it must be above 0"]
        try:
            self._loss()
        except ValueError as error:
            wrong.append(str(error))
        return wrong

    def _loss(self) -> losses.SinKD:
        return losses.SinKD(self.temperature, self.epsilon, self.iterations, self.detach_plan)

    def loss(self, signals: Signals) -> Tensor:
        own, other, mine, weight = sampled_over_ranks(signals, signals["student.rows"], self.rows)
        if not len(own):
            return signals["student.rows"].student.sum() * 0.0
        student, teacher = both_logits(signals, own, other)  # [n, V] each
        if self.columns is not None:
            columns = losses.union_of_top(teacher, self.columns)  # [U]
            student, teacher = student[:, columns], teacher[:, columns]
        return self._loss()(student, teacher)[mine.to(signals.device)].sum() * weight
