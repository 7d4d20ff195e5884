"""Several sources at once: each sample of a step goes to one of them, by its share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from mmkd.answers import AnswerSource, GeneratedAnswers, Log, Stage, generating
from mmkd.answers.data import DataAnswers
from mmkd.errors import DataError
from mmkd.terms.term import Schedule
from mmkd.towers.modes import evaluating


class MixedAnswers(AnswerSource):
    """Deals the samples of each micro-batch out to sources that generate; what is left over keeps the answer of the data.

    Which source a sample goes to, and what is drawn for it, depends on the seed, the step and the sample's id alone: a run that
    was stopped, or is spread over other processes, gets the same answers.
    """

    generates = True

    def __init__(self, sources: Mapping[str, tuple[Schedule, GeneratedAnswers]], stage: Stage):
        self.sources, self.stage = sources, stage
        self.step, self.progress = 0, 0.0
        self._log: dict[str, list[float]] = {}

    def begin(self, step: int, progress: float) -> None:
        self.step, self.progress = step, progress

    def take(self, coming: Iterator[Any], count: int) -> list[Any]:
        self._log = {name: [0.0, 0.0] for name in ("generated_share", "generated_length", "generated_cut", "generated_empty")}
        return [self._answered(inputs["batch"]) for inputs in islice(coming, count)]

    def observed(self) -> Log:
        return {name: (total, number) for name, (total, number) in self._log.items()}

    def _answered(self, waiting: Any) -> dict[str, Any]:
        """waiting: what the loader gives in place of a batch, with `pairs`."""
        pairs = list(waiting.pairs)
        dealt = [None if self.stage.is_skip(pair) else self._source_of(pair) for pair in pairs]
        found: dict[int, list[Any]] = {}
        for name, (_, source) in self.sources.items():
            places = [n for n, own in enumerate(dealt) if own == name]
            for place, new in zip(places, self._generated(source, [pairs[n] for n in places]), strict=True):
                found[place] = new
        self._count("generated_share", len(found), sum(not self.stage.is_skip(pair) for pair in pairs))
        return self.stage.batch([new for place, pair in enumerate(pairs) for new in found.get(place, [pair])])

    def _source_of(self, pair: Any) -> str | None:
        """The name of the source that answers; None for the data."""
        draw = self._seed("source", pair.student.id) / 2**63
        for name, (share, _) in self.sources.items():
            draw -= share.at(self.progress)
            if draw < 0:
                return name
        return None

    def _generated(self, source: GeneratedAnswers, pairs: Sequence[Any]) -> list[list[Any]]:
        """Of each pair the pairs with its new answers."""
        if not pairs:
            return []
        draws = range(source.samples)
        asked = [self.stage.asked(pair, self._seed(f"draw {n}", pair.student.id)) for pair in pairs for n in draws]
        with evaluating(self.stage.student.model), torch.no_grad():
            answers = source.answer_beside(self.stage.student, self.stage.teachers, asked)
        ends = self.stage.student.stop_ids
        self._count("generated_length", sum(map(len, answers)), len(answers))
        self._count("generated_cut", sum(not ids or ids[-1] not in ends for ids in answers), len(answers))
        self._count("generated_empty", sum(len(ids) == 1 and ids[0] in ends for ids in answers), len(answers))
        new = iter(answers)
        return [[self.stage.answered(pair, next(new), n) for n in draws] for pair in pairs]

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
