"""Aspects of a picture, which a teacher said yes or no to, as soft targets of a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import SampleError, shown
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Term
from mmkd.towers.samples import Sample


@register("terms", "aspects")
@dataclass(frozen=True)
class Aspects(Term):
    """Binary cross-entropy of a linear head on the picture with the teacher's P(yes) of an aspect; a sample tells one aspect.

    aspects: the questions, an output of the head each; a sample is told of by its own question.  odds: the key of `told` with the
    teacher's log p(yes) - log p(no), which the check `judge` keeps there; samples without it count nothing.
    """

    example: ClassVar[Mapping[str, Any]] = {"aspects": ["Is it outdoors?"]}
    origin: ClassVar[str] = "MaKD (arXiv 2501.13341), multi-aspect distillation"
    status: ClassVar[str] = (
        "confirmed: BCE with P(yes) of yes and no alone, outputs dropped at the end; our choice: the mean of the picture's "
        "features as the head's input, one aspect a sample, K of one's own"
    )
    needs: ClassVar[tuple[str, ...]] = ("student.features",)
    count: ClassVar[str] = "pictured"

    aspects: tuple[str, ...] = ()
    odds: str = "odds"
    temperature: float = 1.0  # of the teacher's odds

    def errors(self) -> list[str]:
        twice = len(set(self.aspects)) < len(self.aspects)
        wrong = ["aspects: name the questions, each once"] if twice or not self.aspects else []
        return [*super().errors(), *wrong, *(["temperature: above 0"] if self.temperature <= 0 else [])]

    def sample_fact(self, sample: Sample) -> tuple[int, float] | None:
        """The number of its aspect and P(yes); None for a sample that tells none. Raises SampleError."""
        question = sample.meta.get("question")
        told = None if question is None else question.told.get(self.odds)
        if told is None or question.question not in self.aspects:
            return None
        try:
            odds = float(told)
        except ValueError:
            odds = math.nan
        if not math.isfinite(odds):
            raise SampleError(f"sample {sample.id!r}: told.{self.odds} is {shown(told)}, no log-odds")
        return self.aspects.index(question.question), float(torch.tensor(odds / self.temperature).sigmoid())

    def extra(self, pair: Pair) -> nn.Module:
        return nn.Linear(pair.student.feature_width, len(self.aspects))

    def loss(self, signals: Signals) -> Tensor:
        images, features, found = signals.inputs.images, signals["student.features"], signals.zero
        for place, fact in enumerate(signals.facts):
            if fact is None or not images[place]:
                continue
            number, target = fact
            said = signals.extra(features[sum(images[:place])].mean(0))[number]
            found = found + F.binary_cross_entropy_with_logits(said, torch.full_like(said, target))
        return found

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        return signals.extra(features).sum() * 0.0
