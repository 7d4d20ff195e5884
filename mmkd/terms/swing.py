"""Flatter and noisier targets for tokens that may be private (Swing)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.rows import row_keys
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Rows, RowTerm
from mmkd.towers.tower import Tower


@register("terms", "swing")
@dataclass(frozen=True)
class Swing(RowTerm):
    """KL(teacher || student) at a temperature, and with noise, that grow with how private a row's token may be.

    How private is our choice: the share of digits among the characters of the token that the row predicts (numbers identify
    people, prices, plates). For another measure, register a subclass with its own `scores`.
    """

    origin: ClassVar[str] = "Swing distillation (arXiv 2212.08349)"
    status: ClassVar[str] = "our choice: scores (share of digits), linear temperature, noise on logits, tau²"
    reads_targets: ClassVar[bool] = True

    tau_min: float = 1.0
    tau_max: float = 4.0
    noise: float = 0.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.Swing(self.tau_min, self.tau_max, self.noise)

    def scores(self, tower: Tower) -> Tensor:
        """How private each token of the student's vocabulary may be, in [0, 1]. [V], on the CPU"""
        texts = [tower.tokenizer.decode([index]).strip() for index in range(len(tower.tokenizer))]
        return torch.tensor([sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts])

    def prepare(self, pair: Pair) -> Tensor:
        return self.scores(pair.student).to(pair.student.device)

    def extras(self, signals: Signals, rows: Rows) -> tuple[Tensor, ...]:
        score = signals.prepared[rows.targets.clamp(0, len(signals.prepared) - 1)]  # [R]
        if self.noise == 0:
            return (score,)
        inputs, mask = signals.inputs, rows.mask(self.positions)
        ids = [name for name, n in zip(inputs.ids, inputs.images, strict=True) if n or not self.switched]
        own = torch.ones(len(rows.samples), dtype=torch.bool) if mask is None else mask
        seeds = torch.zeros(len(own), dtype=torch.int64).masked_scatter(own, row_keys(ids, rows.samples[own]))  # [R]
        return score, seeds.to(score.device)
