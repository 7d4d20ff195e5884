"""Skewed divergences whose skew follows how far apart student and teacher are on an answer (DistiLLM-2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkd import losses
from mmkd.engine.rows import row_log_probs
from mmkd.losses.numerics import exact
from mmkd.registry import register
from mmkd.terms.mixture import target_log_probs
from mmkd.terms.signals import Signals
from mmkd.terms.state import ExactState
from mmkd.terms.term import Pair, Rows, RowTerm


@dataclass(frozen=True)
class AdaptiveSkew(RowTerm):
    """What both directions share: the gap of each answer, and its mean over the first `anchor_steps` steps, the anchor.

    lam: the skew while there is no anchor, and the largest.  least: the smallest.
    """

    status: ClassVar[str] = (
        "confirmed; our choice: a mean over tokens, where the released code takes one over answers of means over their tokens; "
        "the anchor of the first anchor_steps steps (there: of the first log)"
    )

    lam: float = 0.1
    least: float = 0.01
    anchor_steps: int = 10

    sign: ClassVar[int] = 1  # of the gap: 1 is by how much more probable the teacher finds an answer, -1 the student

    def errors(self) -> list[str]:
        found = super().errors()
        if not 0 < self.least <= self.lam < 1:
            found.append(f"least is {self.least} and lam {self.lam}; they lie between 0 and 1, lam not below least")
        return [*found, *(["anchor_steps must be at least 1"] if self.anchor_steps < 1 else [])]

    @property
    def followed(self) -> str:
        return f"{self.name}_gap"

    def extra(self, pair: Pair) -> nn.Module:
        """Steps that count for the anchor so far, and the sum of their gaps."""
        return ExactState(torch.zeros(2, dtype=torch.float64, device=pair.student.device))

    def update(self, extra: nn.Module, mean: float, progress: float) -> None:
        if extra.state[0] < self.anchor_steps:
            extra.state.add_(torch.tensor([1.0, mean], dtype=torch.float64, device=extra.state.device))

    @torch.no_grad()
    def extras(self, signals: Signals, rows: Rows) -> tuple[Tensor, ...]:
        """The skew of each row, [R], that of its answer."""
        mask = rows.mask(self.positions)
        where = torch.arange(len(rows.targets)) if mask is None else mask.nonzero().squeeze(-1)
        answers, place = torch.unique(rows.samples[where], return_inverse=True)
        gap = self._gaps(signals, rows, where.to(signals.device), place.to(signals.device), len(answers))
        signals.observe(self.followed, gap.sum().float(), torch.tensor(float(len(answers))))
        found = torch.full((len(rows.targets),), self.lam, dtype=torch.float64, device=signals.device)
        steps, total = signals.extra.state
        if steps >= self.anchor_steps:
            own = losses.adaptive_lam(gap, (total / steps).to(gap.device), self.lam, self.least)
            found[where.to(found.device)] = own[place.to(found.device)].to(found.device)
        return (found,)

    def _gaps(self, signals: Signals, rows: Rows, where: Tensor, place: Tensor, answers: int) -> Tensor:
        """Of each answer the difference of its geometric mean probabilities under both models, float64. [answers]"""
        options = {"vocabulary": signals.vocabulary, "chunk_bytes": signals.chunk_bytes}
        targets = rows.targets[where].clamp(0, signals.vocabulary - 1)
        own = row_log_probs(rows.student.detach()[where], rows.student_head, targets, **options)
        theirs = target_log_probs(signals, rows)[where]
        tokens = torch.bincount(place, minlength=answers).clamp(min=1)
        p, q = (torch.zeros(answers, dtype=torch.float64, device=where.device).index_add_(0, place, exact(x)) / tokens
                for x in (theirs, own))  # fmt: skip
        return self.sign * (p.exp() - q.exp())


@register("terms", "adaptive_skew_kl")
@dataclass(frozen=True)
class AdaptiveSkewKL(AdaptiveSkew):
    """KL(teacher || lam teacher + (1 - lam) student) on the teacher's answers; lam is smaller where both are close."""

    origin: ClassVar[str] = "DistiLLM-2 (arXiv 2503.07067) and its released code, on teacher answers"

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.AdaptiveSkewKL()


@register("terms", "adaptive_skew_reverse_kl")
@dataclass(frozen=True)
class AdaptiveSkewReverseKL(AdaptiveSkew):
    """KL(student || lam student + (1 - lam) teacher), no gradient through the mixture, on the student's answers; lam as above."""

    origin: ClassVar[str] = "DistiLLM-2 (arXiv 2503.07067) and its released code, on student answers"
    sign: ClassVar[int] = -1

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.AdaptiveSkewReverseKL()
