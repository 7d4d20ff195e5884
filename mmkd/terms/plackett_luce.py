"""The teacher's ranking of the tokens (PLD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import RowTerm


@register("terms", "pld")
@dataclass(frozen=True)
class PLD(RowTerm):
    """Likelihood of the teacher's ranking, the label first: one term in the place of cross-entropy and distillation."""

    origin: ClassVar[str] = "PLD (arXiv 2506.12542)"
    status: ClassVar[str] = "confirmed; our choice: k = 64 instead of all classes, temperature 1"
    reads_targets: ClassVar[bool] = True
    memory_factor: ClassVar[int] = 4

    k: int = 64
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.PLD(self.k, self.temperature)
