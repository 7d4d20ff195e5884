"""Reverse KL along the student's own answers by policy gradient: a token's reward is how much likelier the teacher finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmkd.engine.rows import Head, row_log_probs
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm
from mmkd.terms.own_answers import OnOwnAnswers
from mmkd.terms.signals import Signals


@register("terms", "policy_gradient")
@dataclass(frozen=True)
class PolicyGradient(OnOwnAnswers, LogitTerm):
    """Reverse KL on sampled tokens: -sum R_t log q(y_t), R_t the discounted sum of log p - log q from t on (gamma 0: k1)."""

    origin: ClassVar[str] = "MiniLLM (arXiv 2306.08543), eq. 4; gamma 0: sampled-token reverse KL"
    status: ClassVar[str] = "our choice: no length normalisation, no teacher-mixed sampling, all answers drawn before the step"
    memory_factor: ClassVar[int] = 2

    gamma: float = 0.0

    def errors(self) -> list[str]:
        found = [] if 0 <= self.gamma <= 1 else [f"gamma is {self.gamma}; it lies between 0 and 1"]
        if self.positions != "generated":
            found.append("policy_gradient learns from answers that the student drew itself; use positions: generated")
        return found

    def loss(self, signals: Signals) -> Tensor:
        rows = signals["student.rows"]
        if not len(rows.targets):  # a micro-batch of the data's answers alone
            return rows.student.sum() * 0.0

        def log_probs(hidden: Tensor, head: Head) -> Tensor:
            return row_log_probs(hidden, head, rows.targets, vocabulary=signals.vocabulary, chunk_bytes=signals.chunk_bytes)

        own = log_probs(rows.student, rows.student_head)  # [R]
        with torch.no_grad():
            reward = log_probs(rows.teacher["hidden"], signals.teacher.head) - own
        return -(returns(reward, rows.samples.to(reward.device), self.gamma) * own).sum()


def returns(reward: Tensor, samples: Tensor, gamma: float) -> Tensor:
    """Of each row its own reward and the discounted ones of the rows behind it in its sample. [R], [R] -> [R]"""
    if gamma == 0:
        return reward
    found, length = reward.clone(), 1
    # Doubling: after each turn a row holds the sum over twice as many rows.
    while length < len(reward):
        same = samples[length:] == samples[:-length]
        found = torch.cat([found[:-length] + gamma**length * found[length:] * same, found[-length:]])
        length *= 2
    return found
