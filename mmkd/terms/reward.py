"""What an official scorer says of the answers that a student gave: the reward of terms that learn from one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.samples import Question, Sample
from mmkd.errors import did_you_mean
from mmkd.registry import registry
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows
from mmkd.towers.sampling import text_of


@dataclass(frozen=True)
class Scorer:
    """An official scorer, by the names of a metric and a parser (`mmkd list metrics`, `mmkd list parsers`)."""

    metric: str = "exact_match"
    parser: str = "identity"

    def errors(self) -> list[str]:
        """What is wrong with the names."""
        named = {"metric": self.metric, "parser": self.parser}
        known = {kind: registry(f"{kind}s") for kind in named}
        return [f"there is no {kind} {name!r}; {did_you_mean(name, known[kind])}"
                for kind, name in named.items() if name not in known[kind]]  # fmt: skip

    def __call__(self, text: str, question: Question) -> float:
        """0.0 to 1.0; 0.0 for words that hold no answer. question: with the references, as `question_of` gives it."""
        found = _parsed(registry("parsers").get(self.parser), text, question.choices)
        if found is None:
            return 0.0
        metric = registry("metrics").get(self.metric)
        return float(metric().score(found, question) if isinstance(metric, type) else metric(found, question.references))


def _parsed(parser: Any, text: str, choices: Sequence[str]) -> str | None:
    if isinstance(parser, type):
        return parser().parse(text, choices)
    return parser(text, choices) if len(inspect.signature(parser).parameters) > 1 else parser(text)


def question_of(sample: Sample) -> Question:
    """The question that a sample asks; its references are the data's, of a choice the answer as it is trained (a letter)."""
    found = sample.meta.get("question", Question(sample.id, "", answer=sample.answer))
    by_choice = found.answer_index is not None
    return replace(found, references=(sample.answer,) if by_choice or not found.references else found.references)


def rewards(scorer: Scorer, signals: Signals, rows: Rows, positions: str) -> dict[int, float]:
    """Of each sample of the batch with rows of a kind its answer's score. signals.facts: (id, question), one a sample."""
    mask, samples = rows.mask(positions), rows.samples
    chosen = torch.ones(len(samples), dtype=torch.bool) if mask is None else mask
    targets, found = rows.targets.cpu(), {}
    for place in samples[chosen].unique().tolist():
        ids = targets[chosen & (samples == place)].tolist()
        found[place] = scorer(text_of(signals.student.tokenizer, ids), signals.facts[place][1])
    return found


def advantages(reward: Tensor, groups: Sequence[Any], by_deviation: bool = True) -> Tensor:
    """Each answer's reward less the mean of its group's, in units of the group's standard deviation; 0 where all are equal. [n]

    The answers to a prompt are a group. The deviation is that of a sample, as n - 1 divides it, with 1e-4 added.
    """
    found = torch.zeros_like(reward)
    for group in dict.fromkeys(groups):
        mine = torch.tensor([one == group for one in groups], device=reward.device)
        own = reward[mine]
        if bool((own != own[0]).any()):
            found[mine] = (own - own.mean()) / ((own.std() + 1e-4) if by_deviation else 1.0)
    return found
