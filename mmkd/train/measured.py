"""What towers say of samples: losses of answers, first words; and the shares of data entries that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from mmkd.answers import Memory
from mmkd.data.samplers.mixture import MovingMixture
from mmkd.data.samples import Sample
from mmkd.errors import DataError, TowerError
from mmkd.towers.inputs import IGNORE
from mmkd.towers.likelihood import logits_of
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Tower, TowerInputs
from mmkd.train.batch import Pair
from mmkd.train.guards import answer_rows

BATCH = 16


def _rows(tower: Tower, inputs: TowerInputs) -> tuple[Tensor, list[int]]:
    """Logits of the rows that predict answers [R, V], and how many rows each sample has."""
    return logits_of(tower, answer_rows(tower, inputs)), (inputs.targets != IGNORE).sum(1).tolist()


@torch.no_grad()
def answer_losses(tower: Tower, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """Of each sample's answer the summed cross-entropy and its tokens. Raises DataError, ImageError, SampleError."""
    found = []
    for start in range(0, len(samples), BATCH):
        inputs = tower.prepare(samples[start : start + BATCH]).to(tower.device)
        logits, counts = _rows(tower, inputs)
        losses = F.cross_entropy(logits, inputs.targets[inputs.response], reduction="none")
        found += [(float(part.sum()), len(part)) for part in losses.split(counts)]
    return found


@torch.no_grad()
def first_words(tower: Tower, samples: Sequence[Sample]) -> list[Tensor]:
    """Of each sample the distribution over the first token of its answer. [V]"""
    found = []
    for start in range(0, len(samples), BATCH):
        inputs = tower.prepare(samples[start : start + BATCH]).to(tower.device)
        logits, counts = _rows(tower, inputs)
        found += [part[0].softmax(-1).cpu() for part in logits.split(counts)]
    return found


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    return math.exp(min(700.0, sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))))


class MixtureSteps(TrainerCallback):
    """Measures student and teacher in each data entry, before the first step and each `every` steps."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._teacher: list[float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mixture: MovingMixture | None = self.trainer.mixture
        if mixture is not None and not mixture.rounds:
            self._measure(mixture)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mixture: MovingMixture | None = self.trainer.mixture
        if mixture is not None and state.global_step % mixture.every == 0:
            self._measure(mixture)

    def _measure(self, mixture: MovingMixture) -> None:
        dataset = self.trainer.train_dataset
        parts = [[dataset.samples[place] for place in places] for places in mixture.measured_on]
        if self._teacher is None:
            towers = [teacher.tower for teacher in self.trainer.teachers if teacher.tower is not None]
            if not towers:
                raise TowerError(
                    "sampler ddk: it measures the teacher that a term of the stage compares with, and none has its model here; "
                    "add a term such as forward_kl, and take a live teacher"
                )
            self._teacher = [perplexity(answer_losses(towers[0], part)) for part in parts]
        mixture.measured([perplexity(answer_losses(dataset.student, part)) for part in parts], self._teacher)


class MemorySteps(TrainerCallback):
    """Measures the student where an answer source asks for it (`mmkd.answers.Memory`), before the first step and each `every`.

    Every process measures all of it, and so finds the same.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for memory in self.trainer.answers.memories.values():
            if not memory.is_measured:
                self._measure(memory)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for memory in self.trainer.answers.memories.values():
            if state.global_step % memory.every == 0:
                self._measure(memory)

    def _measure(self, memory: Memory) -> None:
        dataset = self.trainer.train_dataset
        places = [place for place in sorted(memory.held_out) if isinstance(dataset.look(place), Pair)]
        if not places:
            raise DataError("answers: none of the samples that are held out, to measure the student on, can be used")
        with evaluating(dataset.student.model):
            found = answer_losses(dataset.student, [dataset.samples[place] for place in places])
        memory.measured(sum(loss for loss, _ in found) / max(1, sum(count for _, count in found)))
