"""Several teachers, weighed by a gate that is learned with the student (MST-Distill)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkd.losses.numerics import exact
from mmkd.registry import register
from mmkd.terms.mixture import TeacherMixture
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Rows


@register("terms", "gated_teachers")
@dataclass(frozen=True)
class GatedTeachers(TeacherMixture):
    """A divergence to the top k of several teachers, weighed sample by sample by a gate that is learned, with a load balance."""

    example: ClassVar[Mapping[str, Any]] = {"teachers": ["a", "b"]}
    origin: ClassVar[str] = "MST-Distill (arXiv 2507.07015)"
    status: ClassVar[str] = (
        "our choice: divergences weighted by the gate, which so gets their gradient (the released gate picks teachers and gets "
        "none); it reads the mean hidden row of the student's answer, not logits; no masked teachers; weight of the balance"
    )

    top_k: int = 2
    balance: float = 0.1  # weight of KL(mean of the gate over the micro-batch's samples || uniform)

    def errors(self) -> list[str]:
        found = super().errors()
        if not found and not 1 <= self.top_k <= len(self.several):
            found.append(f"top_k is {self.top_k}; it lies between 1 and the {len(self.several)} teachers")
        return [*found, *(["balance must not be negative"] if self.balance < 0 else [])]

    def extra(self, pair: Pair) -> nn.Module:
        width = pair.student.head.weight.shape[1]
        gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(self.several)))
        nn.init.zeros_(gate[-1].weight)  # all teachers alike at first
        nn.init.zeros_(gate[-1].bias)
        return gate

    def weights(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows]) -> Tensor:
        gate = self.gate(signals, rows[0])
        return kept(gate, self.top_k)[self._place(signals, rows[0])].T

    def loss(self, signals: Signals) -> Tensor:
        value, rows = super().loss(signals), signals.of(self.several[0])["student.rows"]
        if not self.balance or not len(rows.targets):
            return value
        # Times the rows, since the sum will be divided by the rows of the step: a mean over micro-batches by rows.
        return value + self.balance * imbalance(self.gate(signals, rows)) * len(rows.targets)

    def gate(self, signals: Signals, rows: Rows) -> Tensor:
        """The weights of the teachers for each sample that has rows. [B, M]"""
        place = self._place(signals, rows)
        hidden = exact(rows.student.detach())
        total = hidden.new_zeros(int(place.max()) + 1, hidden.shape[1]).index_add_(0, place, hidden)
        number = torch.bincount(place).clamp(min=1)[:, None]
        mean = (total / number).to(next(signals.extra.parameters()).dtype)
        return exact(signals.extra(mean)).softmax(-1)

    @staticmethod
    def _place(signals: Signals, rows: Rows) -> Tensor:
        """Of each row, which of the samples that have rows it is of. [R]"""
        return torch.unique(rows.samples, return_inverse=True)[1].to(signals.device)


def kept(gate: Tensor, k: int) -> Tensor:
    """The k largest weights of each sample, made to add up to 1; the others 0. [B, M] -> [B, M]"""
    best = gate.topk(k, -1).indices
    chosen = torch.zeros_like(gate).scatter(-1, best, 1.0) * gate
    return chosen / chosen.sum(-1, keepdim=True)


def imbalance(gate: Tensor) -> Tensor:
    """KL of the gate's mean over samples to uniform. [B, M] -> scalar"""
    mean = gate.mean(0)
    return (mean * (mean * len(mean)).log()).sum()
