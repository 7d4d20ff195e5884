"""KEPO: learning from the scores of a group of answers, and from a teacher along those that are good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmkd.data.samples import Question, Sample
from mmkd.engine.rows import row_log_probs
from mmkd.registry import register
from mmkd.teachers.teacher import Gives
from mmkd.terms.coupled import LogitTerm
from mmkd.terms.divergences import ReverseKL
from mmkd.terms.own_answers import OnOwnAnswers
from mmkd.terms.reward import Scorer, advantages, question_of, rewards
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Rows


@register("terms", "group_reward")
@dataclass(frozen=True)
class GroupReward(OnOwnAnswers, LogitTerm):
    """Minus the log-probability of the student's answers, times how much better they score than others to the prompt (GRPO)."""

    origin: ClassVar[str] = "GRPO (arXiv 2402.03300), in KEPO (arXiv 2602.00400)"
    status: ClassVar[str] = "our choice: a mean over all tokens; one step for each draw, so that no ratio is there to be clipped"
    needs: ClassVar[tuple[str, ...]] = ("student.rows",)
    memory_factor: ClassVar[int] = 2

    metric: str = "exact_match"
    parser: str = "identity"
    by_deviation: bool = True

    @property
    def teacher_positions(self) -> frozenset[str]:
        return frozenset()

    def errors(self) -> list[str]:
        found = Scorer(self.metric, self.parser).errors()
        if self.positions != "generated":
            found.append("group_reward learns from answers that the student drew itself; use positions: generated")
        return found

    def check(self, pair: Pair) -> list[str]:
        return []

    def refusal(self, gives: Gives) -> str | None:
        return None

    def sample_fact(self, sample: Sample) -> tuple[str, Question]:
        return sample.id, question_of(sample)

    def loss(self, signals: Signals) -> Tensor:
        rows = signals["student.rows"]
        found = rewards(Scorer(self.metric, self.parser), signals, rows, self.positions)
        reward = torch.tensor(list(found.values()), dtype=torch.float64)
        # The same number of entries in each process: a micro-batch of the data's answers alone counts nothing.
        signals.observe(f"{self.name}_score", reward.sum().float(), torch.tensor(float(len(reward))))
        if not len(rows.targets):
            return rows.student.sum() * 0.0
        own = advantages(reward, [signals.facts[place][0] for place in found], self.by_deviation)
        of_sample = torch.zeros(len(signals.facts), dtype=torch.float64)
        of_sample[list(found)] = own
        options = {"vocabulary": signals.vocabulary, "chunk_bytes": signals.chunk_bytes}
        said = row_log_probs(rows.student, rows.student_head, rows.targets, **options)  # [R]
        return -(of_sample[rows.samples].to(said.device, said.dtype) * said).sum()


@register("terms", "rewarded_reverse_kl")
@dataclass(frozen=True)
class RewardedReverseKL(OnOwnAnswers, ReverseKL):
    """Reverse KL on those of the student's own answers that score `threshold` at least, 0 on others."""

    origin: ClassVar[str] = "KEPO (arXiv 2602.00400), gated distillation"
    status: ClassVar[str] = "our choice: reverse KL, threshold 1, divided by the tokens of all the student's answers"
    reads_targets: ClassVar[bool] = True

    metric: str = "exact_match"
    parser: str = "identity"
    threshold: float = 1.0

    @property
    def learns_answers(self) -> bool:
        return False  # the teacher's distribution, not the tokens

    def errors(self) -> list[str]:
        found = [*super().errors(), *Scorer(self.metric, self.parser).errors()]
        if self.positions != "generated":
            found.append("rewarded_reverse_kl reads answers that the student drew itself; use positions: generated")
        if not 0 <= self.threshold <= 1:
            found.append(f"threshold is {self.threshold}; scores lie between 0 and 1")
        return found

    def sample_fact(self, sample: Sample) -> tuple[str, Question]:
        return sample.id, question_of(sample)

    def row_weights(self, signals: Signals, rows: Rows) -> Tensor:
        found = rewards(Scorer(self.metric, self.parser), signals, rows, self.positions)
        is_open = torch.zeros(len(signals.facts))
        is_open[[place for place, reward in found.items() if reward >= self.threshold]] = 1.0
        return is_open[rows.samples].to(rows.student.device)
