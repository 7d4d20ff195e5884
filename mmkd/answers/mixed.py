"""Several sources at once: each sample of a step goes to one of them, by its share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from mmkd.answers import AnswerSource, GeneratedAnswers, Log, Stage, generating
from mmkd.answers.data import DataAnswers
from mmkd.base.distributed import of_all
from mmkd.errors import DataError
from mmkd.terms.term import Schedule
from mmkd.towers.modes import evaluating


class MixedAnswers(AnswerSource):
    """Deals the samples of each micro-batch out to sources that generate; what is left over keeps the answer of the data.

    Which source a sample goes to, and what is drawn for it, depends on the seed, the step and the sample's id alone: a run that
    was stopped, or is spread over other processes, gets the same answers. What a source remembers (`Memory`) is that of before
    the step, and what all processes added to it after the steps before.
    """

    generates = True

    def __init__(self, sources: Mapping[str, tuple[Schedule, GeneratedAnswers]], stage: Stage):
        self.sources, self.stage = sources, stage
        self.step, self.progress = 0, 0.0
        self._log: dict[str, list[float]] = {}
        found = {name: source.memory(stage.size, stage.seed) for name, (_, source) in sources.items()}
        self.memories = {name: memory for name, memory in found.items() if memory is not None}
        self._held_out = frozenset().union(*(memory.held_out for memory in self.memories.values()))
        self._new: list[tuple[int, str, int, list[int]]] = []  # of this step: draw, source, the sample's place, answer

    def begin(self, step: int, progress: float) -> None:
        self.step, self.progress = step, progress

    def take(self, coming: Iterator[Any], count: int) -> list[Any]:
        self._log = {name: [0.0, 0.0] for name in ("generated_share", "generated_length", "generated_cut", "generated_empty")}
        self._log |= {f"{name}_{fact}": [0.0, 0.0] for name in self.memories for fact in ("share", "recalled")}
        self._new = []
        batches = [self._answered(inputs["batch"]) for inputs in islice(coming, count)]
        for name, memory in self.memories.items():
            self._count(f"{name}_share", memory.share(self.progress), 1)
        if self.memories:
            self._remember()
        return batches

    def observed(self) -> Log:
        return {name: (total, number) for name, (total, number) in self._log.items()}

    def _answered(self, waiting: Any) -> dict[str, Any]:
        """waiting: what the loader gives in place of a batch, with `pairs`."""
        pairs = [pair if self.stage.is_skip(pair) else self.stage.usable(pair, self._held_out) for pair in waiting.pairs]
        dealt = [None if self.stage.is_skip(pair) else self._source_of(pair) for pair in pairs]
        found: dict[int, list[Any]] = {}
        for name, (_, source) in self.sources.items():
            mine = {n: own[1] for n, own in enumerate(dealt) if own is not None and own[0] == name}
            again = {n: new for n, place in mine.items() if (new := self._recalled(name, place, pairs[n])) is not None}
            stays = {n: [pairs[n]] if source.beside else [] for n in mine}
            found |= {n: [*stays[n], new] for n, new in again.items()}
            places = [n for n in mine if n not in again]
            for n, new in zip(places, self._generated(name, source, [pairs[n] for n in places]), strict=True):
                found[n] = [*stays[n], *new]
            if name in self.memories:
                self._count(f"{name}_recalled", len(again), sum(not self.stage.is_skip(pair) for pair in pairs))
        self._count("generated_share", len(found), sum(not self.stage.is_skip(pair) for pair in pairs))
        return self.stage.batch([new for place, pair in enumerate(pairs) for new in found.get(place, [pair])])

    def _source_of(self, pair: Any) -> tuple[str, float] | None:
        """The name of the source that answers, and where in its share the sample came to lie, 0..1; None for the data."""
        draw = self._seed("source", pair.student.id) / 2**63
        for name, (schedule, _) in self.sources.items():
            share = self.memories[name].share(self.progress) if name in self.memories else schedule.at(self.progress)
            if draw < share:
                return name, draw / share
            draw -= share
        return None

    def _recalled(self, name: str, place: float, pair: Any) -> Any:
        """What a source's memory gives in the place of a new answer to a pair; None where it shall answer anew."""
        if name not in self.memories:
            return None
        found = self.memories[name].recalled(place, self._seed("recalled", pair.student.id), self.progress)
        return None if found is None else self.stage.answered(self.stage.pair(found[0]), found[1], 0)

    def _generated(self, name: str, source: GeneratedAnswers, pairs: Sequence[Any]) -> list[list[Any]]:
        """Of each pair the pairs with its new answers."""
        if not pairs:
            return []
        draws = range(source.samples)
        seeds = [[self._seed(f"draw {n}", pair.student.id) for n in draws] for pair in pairs]
        asked = [self.stage.asked(pair, seed) for pair, own in zip(pairs, seeds, strict=True) for seed in own]
        with evaluating(self.stage.student.model), torch.no_grad():
            answers = source.answer_beside(self.stage.student, self.stage.teachers, asked)
        ends = self.stage.student.stop_ids
        self._count("generated_length", sum(map(len, answers)), len(answers))
        self._count("generated_cut", sum(not ids or ids[-1] not in ends for ids in answers), len(answers))
        self._count("generated_empty", sum(len(ids) == 1 and ids[0] in ends for ids in answers), len(answers))
        if name in self.memories:
            who = [(pair.index, seed) for pair, own in zip(pairs, seeds, strict=True) for seed in own]
            self._new += [(seed, name, index, ids) for (index, seed), ids in zip(who, answers, strict=True)]
        new = iter(answers)
        return [[self.stage.answered(pair, next(new), n) for n in draws] for pair in pairs]

    def _remember(self) -> None:
        """What was answered anew in this step, here and in the other processes, goes into the memories."""
        new = sorted(one for part in of_all(self._new) for one in part)
        for name, memory in self.memories.items():
            memory.keep([(index, ids) for _, source, index, ids in new if source == name])

    def _count(self, name: str, total: float, number: float) -> None:
        self._log[name] = [self._log[name][0] + total, self._log[name][1] + number]

    def _seed(self, use: str, sample: str) -> int:
        """A number below 2**63."""
        text = f"{self.stage.seed} {self.step} {use} {sample}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def answer_source(answers: Mapping[str, Any], stage: Stage | None) -> AnswerSource:
    """The source of a stage's `answers`. stage: what it works for, where one of them generates. Raises DataError."""
    sources = generating(answers)
    wrong = [f"answers.{name}: {error}" for name, (_, source) in sources.items()
             for error in source.needs(stage.student, stage.teachers)]  # fmt: skip
    if wrong:
        raise DataError("; ".join(wrong))
    return MixedAnswers(sources, stage) if sources else DataAnswers()
