"""Skewed divergences: against a mixture of both distributions, so that they stay bounded (DistiLLM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import RowTerm


@register("terms", "skew_kl")
@dataclass(frozen=True)
class SkewKL(RowTerm):
    """KL(teacher || lam teacher + (1 - lam) student), times the square of the temperature."""

    origin: ClassVar[str] = "DistiLLM (arXiv 2402.03898), skew KL"
    status: ClassVar[str] = "confirmed; our choice: a temperature"

    lam: float = 0.1
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.SkewKL(self.lam, self.temperature)


@register("terms", "skew_reverse_kl")
@dataclass(frozen=True)
class SkewReverseKL(RowTerm):
    """KL(student || lam student + (1 - lam) teacher), times the square of the temperature."""

    origin: ClassVar[str] = "DistiLLM (arXiv 2402.03898), skew reverse KL"
    status: ClassVar[str] = "confirmed; our choice: a temperature"

    lam: float = 0.1
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.SkewReverseKL(self.lam, self.temperature)
