"""Forward and reverse KL mixed: by where the models differ, by the teacher's likeliest tokens, by which model is surer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import RowTerm


@register("terms", "adaptive_kl")
@dataclass(frozen=True)
class AdaptiveKL(RowTerm):
    """Forward and reverse KL, weighted by how much head and tail of the teacher's distribution differ."""

    origin: ClassVar[str] = "AKL (arXiv 2404.02657)"
    status: ClassVar[str] = "confirmed; our choice: a temperature"

    mu: float = 0.5
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.AdaptiveKL(self.mu, self.temperature)
