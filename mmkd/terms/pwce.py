"""Cross-entropy that gives more weight to the tokens with a high perplexity (PWCE)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd import losses
from mmkd.engine.positions import gathered, rows_at
from mmkd.engine.rows import row_log_probs
from mmkd.losses.numerics import exact
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows, RowTerm


@register("terms", "pwce")
@dataclass(frozen=True)
class PWCE(RowTerm):
    """Cross-entropy weighted by each token's share of the mean perplexity of the whole step; it needs no teacher."""

    origin: ClassVar[str] = "LAMO (arXiv 2604.13488), PWCE"
    status: ClassVar[str] = "our choice: no gradient through the weights, a = 1, lam = 1"
    needs: ClassVar[tuple[str, ...]] = ("student.rows", "student.hidden")  # type: ignore[assignment]
    teacher_logits: ClassVar[bool] = False
    memory_factor: ClassVar[int] = 2

    a: float = 1.0
    lam: float = 1.0
    epsilon: float = 1e-6

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.PWCE(self.a, self.lam, self.epsilon)

    def step_sums(self, signals: Signals) -> Tensor:
        """The sum of the perplexities of this micro-batch's rows, float64. [1]"""
        where = rows_at(signals.inputs, self.positions)  # [B, L]
        targets = torch.where(signals.inputs.response, signals.inputs.targets, signals.inputs.next_ids)[where]  # [R]
        return self._perplexities(signals, gathered(signals["student.hidden"], where), targets.to(signals.device))

    def extras(self, signals: Signals, rows: Rows) -> tuple[Tensor, ...]:
        """The logarithm of the mean perplexity, which the head's products are made once more for. [R]"""
        total, count, mask = signals.step_sums, signals.global_counts[self.positions], rows.mask(self.positions)
        if total is None:
            own = slice(None) if mask is None else mask.nonzero().squeeze(-1).to(rows.targets.device)
            total = self._perplexities(signals, rows.student[own], rows.targets[own])  # [1]
        return ((total.to(rows.targets.device) / float(count)).log().expand(len(rows.targets)),)

    def _perplexities(self, signals: Signals, hidden: Tensor, targets: Tensor) -> Tensor:
        options = {"vocabulary": signals.vocabulary, "chunk_bytes": signals.chunk_bytes}
        ce = -row_log_probs(hidden.detach(), signals.head, targets, **options).detach()  # [R]
        return exact(ce).exp().sum(0, keepdim=True)
