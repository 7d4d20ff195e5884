"""Preference terms: a chosen against a rejected answer, with the teacher as the reference (LLaVA-MoD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmkd import losses
from mmkd.losses.preference import BETA
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import Term


@dataclass(frozen=True)
class PreferenceTerm(Term):
    """What DPO and KTO have in common: `beta`, and rewards in the log."""

    needs: ClassVar[tuple[str, ...]] = ("pair.log_probs", "pair.reference")
    count: ClassVar[str] = "pair"
    memory_factor: ClassVar[int] = 2

    beta: float = BETA

    def errors(self) -> list[str]:
        return [f"beta is {self.beta}; it must be above 0"] if self.beta <= 0 else []

    def values(self, signals: Signals) -> Tensor:
        """The losses of the pairs, [B], or two a pair, [2 B]."""
        raise TypeError(f"{type(self).__name__} has no values")

    def loss(self, signals: Signals) -> Tensor:
        own, reference = signals["pair.log_probs"], signals["pair.reference"]
        rewards = self.beta * (own - reference).detach()  # [2, B]
        chosen, rejected = rewards
        pairs = torch.tensor(float(len(chosen)))
        signals.observe(f"{self.name}_margin", (chosen - rejected).sum(), pairs)
        signals.observe(f"{self.name}_accuracy", (chosen > rejected).float().sum(), pairs)
        signals.observe(f"{self.name}_chosen_reward", chosen.sum(), pairs)
        signals.observe(f"{self.name}_rejected_reward", rejected.sum(), pairs)
        values = self.values(signals)
        return values.sum() * (own.shape[1] / len(values))  # paired KTO gives two values a pair


@register("terms", "dpo")
@dataclass(frozen=True)
class DPO(PreferenceTerm):
    """Direct preference optimisation, -log sigmoid of the scaled difference of log-ratios to the teacher."""

    origin: ClassVar[str] = "DPO (arXiv 2305.18290), eq. 7; LLaVA-MoD (arXiv 2408.15881)"
    status: ClassVar[str] = "confirmed"
    label_smoothing: float = 0.0
    form: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"

    def errors(self) -> list[str]:
        found = super().errors()
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        return found

    def values(self, signals: Signals) -> Tensor:
        given = (*signals["pair.log_probs"], *signals["pair.reference"])
        return losses.dpo(*given, self.beta, self.label_smoothing, self.form)


@register("terms", "kto_pair")
@dataclass(frozen=True)
class KTOPair(PreferenceTerm):
    """Paired KTO: each answer against the mean log-ratio of the other kind over the whole step."""

    origin: ClassVar[str] = "KTO (arXiv 2402.01306), paired; LLaVA-MoD (arXiv 2408.15881)"
    status: ClassVar[str] = "our choice: mean log-ratio over the whole step"
    detach_kl: bool = True

    @property
    def has_step_sums(self) -> bool:
        return self.detach_kl  # with a gradient through it, it is of the batch itself

    def step_sums(self, signals: Signals) -> Tensor:
        """Sums of log p_student - log p_teacher of the chosen and of the rejected answers. [2]"""
        return (signals["pair.log_probs"] - signals["pair.reference"]).sum(1)

    def values(self, signals: Signals) -> Tensor:
        kl = None
        if signals.step_sums is not None:
            kl = (signals.step_sums / signals.global_counts["pair"].clamp(min=1)).clamp(min=0).to(signals.device).unbind()
        return losses.kto_pair(*signals["pair.log_probs"], *signals["pair.reference"], self.beta, self.detach_kl, kl)

    def check_step(self, micro_batches: int, processes: int) -> list[str]:
        if self.detach_kl or micro_batches * processes == 1:
            return []
        return [
            f"detach_kl is false, but a step is {micro_batches} micro-batches in {processes} processes, and a gradient cannot "
            "pass between them; use one process and micro_batch_size = batch_size, or detach_kl: true"
        ]
