"""Forward and reverse KL mixed: by where the models differ, by the teacher's likeliest tokens, by which model is surer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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


@register("terms", "topkld")
@dataclass(frozen=True)
class TopKLD(RowTerm):
    """Reverse KL on the teacher's k likeliest tokens, forward KL on all others."""

    origin: ClassVar[str] = "TopKLD (arXiv 2501.06218)"
    status: ClassVar[str] = "our choice: formula (generalised KLs), k = 50, a temperature"

    k: int = 50
    temperature: float = 1.0
    form: Literal["generalised", "plain"] = "generalised"

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.TopKLD(self.k, self.temperature, self.form)


@register("terms", "bd_kd")
@dataclass(frozen=True)
class BDKD(RowTerm):
    """Forward plus reverse KL, each row's weights by whether the student is surer than the teacher."""

    origin: ClassVar[str] = "BD-KD (arXiv 2212.12965)"
    status: ClassVar[str] = "our choice: which KL is raised, by one factor; weights 1, 1 and 2; a token as the sample"

    a: float = 1.0
    b: float = 1.0
    boost: float = 2.0
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.BDKD(self.a, self.b, self.boost, self.temperature)
