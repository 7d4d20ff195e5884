"""A target that moves from the student to the teacher (TAID), and where it has got to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.state import ExactState
from mmkd.terms.term import Pair, Rows, RowTerm


@register("terms", "taid")
@dataclass(frozen=True)
class TAID(RowTerm):
    """Cross-entropy with a target that moves from the student to the teacher, the faster the more the loss falls."""

    origin: ClassVar[str] = "TAID (arXiv 2501.16937) and its released code"
    status: ClassVar[str] = "confirmed"

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True

    def schedule(self) -> losses.TAIDSchedule:
        return losses.TAIDSchedule(self.t_start, self.t_end, self.alpha, self.beta, self.adaptive)

    def row_loss(self, signals: Signals | None = None) -> losses.TAID:
        self.schedule()  # refuses wrong options
        return losses.TAID()

    def extra(self, pair: Pair) -> nn.Module:
        return ExactState(self.schedule().start(pair.student.device))

    def extras(self, signals: Signals, rows: Rows) -> tuple[Tensor, ...]:
        return (signals.extra.state[:1].expand(len(rows.targets)),)

    def update(self, extra: nn.Module, mean: float, progress: float) -> None:
        extra.state.copy_(self.schedule().next(extra.state, mean, progress))
