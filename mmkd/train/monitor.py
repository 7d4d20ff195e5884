"""How far a student is from its teacher, and from what its stage never sees, on prompts that it is never trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mmkd.answers import generating
from mmkd.answers.student import StudentAnswers
from mmkd.data.lazy import is_lazy
from mmkd.data.samples import Sample
from mmkd.errors import DataError, TowerError
from mmkd.registry import registry
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Place, Term
from mmkd.towers.modes import evaluating
from mmkd.train.batch import Pair
from mmkd.train.build_stage import Stage
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.measured import answer_losses
from mmkd.train.rollouts import Rollouts
from mmkd.train.spec import MonitorSpec

logger = logging.getLogger(__name__)

BATCH = 16
GOLDEN = "golden"  # the name of the term that compares with the oracle


class Monitor:
    """Measures proxy and golden loss of a stage's student on held-out samples (teacher hacking, arXiv 2502.02671).

    The proxy is the mean distance to the teachers that the stage reads: a term of kind `monitor.proxy` in each of them, a token.
    The golden loss is that of the same term to the oracle, or the cross-entropy of the labels, in nats a token. Where the stage
    learns from the student's own answers, the distances are on answers that it draws itself, else on those of the data. What is
    drawn for a sample depends on the seed and its id alone, so that two measurements differ by the student.
    """

    def __init__(self, stage: Stage, samples: Sequence[Sample], oracle: Teacher | None, seed: int, chunk_bytes: int):
        """samples: with the answers of the data; those that the stage trains on are left out. Raises DataError, TowerError."""
        self.spec, self.student, self.seed = stage.spec.monitor, stage.student, seed
        teachers = {**stage.teachers} | ({self.spec.oracle: oracle} if oracle is not None else {})
        terms = distances(self.spec, stage.teachers)
        self.source = own_answers(stage.spec.answers)
        samples = never_trained_on(samples, stage.dataset.samples)
        options = {"max_skipped": len(samples), "generates": self.source is not None}
        self.dataset = PairDataset(samples, self.student, teachers, terms, **options)
        try:
            self.distiller = Distiller(self.student, teachers, terms, chunk_bytes=chunk_bytes)
        except TowerError as error:
            raise TowerError(f"monitor: {error}") from error
        self.pairs = [pair for place in range(len(samples)) if isinstance(pair := self.dataset.look(place), Pair)]
        if not self.pairs:
            raise DataError(f"monitor: none of {len(samples)} held-out samples can be read")
        self.labels_are_golden = oracle is None

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """{"proxy", "golden"} of the student as it is. Raises DataError where no answer has a token to compare."""
        with evaluating(self.distiller):
            sums = self._sums()
            found = {name: total / count for name, (total, count) in sums.items() if count}
            proxies = [value for name, value in found.items() if name != GOLDEN]
            if len(found) < len(sums):
                raise DataError("monitor: no answer to the held-out prompts has a token at which models can be compared")
            golden = self._labels() if self.labels_are_golden else found[GOLDEN]
        return {"proxy": sum(proxies) / len(proxies), "golden": golden}

    def _sums(self) -> dict[str, tuple[float, float]]:
        """Of each distance the sum over rows and their number."""
        sums = {term.name: (0.0, 0.0) for term in self.distiller.terms}
        for batch in self._batches():
            for name, (total, count) in self.distiller(batch)[1].items():
                if name in sums:
                    sums[name] = (sums[name][0] + float(total), sums[name][1] + float(count))
        return sums

    def _batches(self) -> Iterable[Any]:
        for start in range(0, len(self.pairs), BATCH):
            answered = [pair for pair in self._answered(self.pairs[start : start + BATCH]) if isinstance(pair, Pair)]
            if answered:
                yield self.dataset.collator(answered)["batch"].to(self.student.device)

    def _answered(self, pairs: Sequence[Pair]) -> Sequence[Any]:
        """The pairs with answers of the student, where the stage learns from these."""
        if self.source is None:
            return pairs
        stage = Rollouts(self.dataset, self.seed)
        asked = [stage.asked(pair, self._seed(pair.student.id)) for pair in pairs]
        answers = self.source.answer(self.student, asked)
        return [self.dataset.answered(pair, ids) for pair, ids in zip(pairs, answers, strict=True)]

    def _labels(self) -> float:
        found = answer_losses(self.student, [self.dataset.samples[pair.index] for pair in self.pairs])
        return sum(loss for loss, _ in found) / max(1, sum(count for _, count in found))

    def _seed(self, sample: str) -> int:
        text = f"monitor {self.seed} {sample}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def distances(spec: MonitorSpec, teachers: Iterable[str]) -> list[Term]:
    """The terms that are measured, of one kind and at its own defaults: to each teacher of a stage, and to the oracle."""
    kind = registry("terms").get(spec.proxy)
    named = {f"proxy {name}": name for name in teachers} | ({GOLDEN: spec.oracle} if spec.oracle is not None else {})
    return [kind(place=Place(name, spec.proxy, teacher=teacher)) for name, teacher in named.items()]


def own_answers(answers: Mapping[str, Any]) -> StudentAnswers | None:
    """How a stage's student answers by itself, without what a source does beside; None where it does not answer."""
    for _, source in generating(answers).values():
        if isinstance(source, StudentAnswers):
            return StudentAnswers(**{name: getattr(source, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")})
    return None


def never_trained_on(samples: Sequence[Sample], trained: Sequence[Sample]) -> list[Sample]:
    """The samples whose pictures and prompt the stage does not have. Of a set that is too large to be read, all.

    Raises DataError where none is left.
    """
    known = set() if is_lazy(trained) else {question_of(sample) for sample in trained}
    found = [sample for sample in samples if question_of(sample) not in known]
    if not found:
        raise DataError(f"monitor: the stage trains on all {len(samples)} held-out samples; take another split (`split: val`)")
    if both := len(samples) - len(found):
        logger.warning("monitor: %d of %d held-out samples are trained on, too, and left out", both, len(samples))
    return found


def question_of(sample: Sample) -> tuple[Any, ...]:
    """What tells two questions apart: pictures by the place where they lie, and the words before the answer."""
    return (*(ref.key for ref in sample.images), *(turn.text for turn in sample.prompt_turns))
