"""Forward KL on the dense part of the teacher's distribution (MGSR): exact for the student, on a sample of rows for the band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm, both_logits, engine_sum, likeliest
from mmkd.terms.rows import row_keys
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair


@register("terms", "dac_kl")
@dataclass(frozen=True)
class DACKL(LogitTerm):
    """Forward KL on the dense band of the teacher's distribution, from low to high or with ends that are learned."""

    origin: ClassVar[str] = "MGSR (arXiv 2407.10068), DAC-KL"
    status: ClassVar[str] = "our choice: quantiles of cumulative mass, one entry for all outside, shape of the MLP, least width"

    band: Literal["learned", "fixed"] = "learned"
    low: float = 0.0
    high: float = 1.0
    softness: float = 0.1
    temperature: float = 1.0
    inputs: int = 32  # likeliest tokens that a learned band reads
    least: float = 0.5
    sample: int = 256  # rows of a micro-batch, at most, on which it is trained

    def errors(self) -> list[str]:
        wrong = []
        if not 0 <= self.low <= self.high <= 1:
            wrong.append(f"low is {self.low} and high {self.high}; they must be 0 <= low <= high <= 1")
        if self.band == "learned" and min(self.softness, self.inputs, self.sample) <= 0:
            wrong.append("a learned band needs softness, inputs and sample above 0")
        try:
            losses.DACKL(self.softness, self.temperature), losses.DenseBand(least=self.least)
        except ValueError as error:
            wrong.append(str(error))
        return wrong

    def extra(self, pair: Pair) -> losses.DenseBand | None:
        return losses.DenseBand(self.inputs, least=self.least) if self.band == "learned" else None

    def loss(self, signals: Signals) -> torch.Tensor:
        rows, loss = signals["student.rows"], losses.DACKL(self.softness, self.temperature)
        if signals.extra is None:
            fixed = torch.tensor([[self.low], [self.high]], device=signals.device).expand(2, len(rows.targets))  # [2, R]
            return engine_sum(signals, rows, loss, tuple(fixed))
        known = likeliest(signals, rows, self.inputs)  # [R, inputs]
        pick = row_keys(signals.inputs.ids, rows.samples).argsort()[: self.sample].to(signals.device)  # [n]
        with torch.no_grad():
            ends, logits = signals.extra(known), both_logits(signals, rows.student[pick], rows.teacher["hidden"][pick])
        value = loss(*logits, None, *signals.extra(known[pick])).sum() * (len(known) / max(1, len(pick)))
        return engine_sum(signals, rows, loss, ends) + value - value.detach()  # of it only the gradient to the band
