"""One stage, put together: the only place where student, teachers, terms and data become what is trained.

The dry run, `mmkd estimate`, `mmkd cache` and the run itself all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmkd.answers import AnswerSource
from mmkd.answers.mixed import answer_source
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.teachers.live import as_teachers
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.quantise import Quantised, fake_quantise, release, settle
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import Receipt
from mmkd.train.batch import Batch, Pair
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.experts import upcycled
from mmkd.train.preference import PreferenceDataset
from mmkd.train.rollouts import Rollouts, refuse_stored, wait
from mmkd.train.skips import allowance
from mmkd.train.spec import StageSpec, TrainSpec
from mmkd.train.token_batches import ByTokens
from mmkd.train.trainable import add_lora, remove_lora, set_trainable


@dataclass
class Stage:
    """A stage as it is trained.

    student: made sparse and with adapters where the stage says so.  teachers: those that are read in each step.
    receipt: of making it sparse.  quantised: what of it computes with quantised weights.
    """

    name: str
    spec: StageSpec
    student: Tower
    teachers: dict[str, Teacher]
    terms: list[Term]
    dataset: PairDataset
    distiller: Distiller
    answers: AnswerSource
    receipt: Receipt | None = None
    quantised: Quantised | None = None

    @property
    def of_pairs(self) -> bool:
        """Whether its samples are pairs of a chosen and a rejected answer."""
        return any(t.needs_pairs for t in self.terms)

    def batch_of(self, count: int) -> Batch:
        """A micro-batch of at most `count` of its samples, on the student's device, to be measured and not trained on."""
        return self.batch_from(list(islice(self.usable(), count)))

    def usable(self) -> Iterator[Pair]:
        """Its samples as they are prepared, to be measured; those that cannot be used are left out."""
        if self.of_pairs:
            self.dataset.reference.zero_()
        self.dataset.skips.allowed = len(self.dataset)  # the preflight has counted them
        return (pair for i in range(len(self.dataset)) if isinstance(pair := self.dataset[i], Pair))

    def batch_from(self, pairs: Sequence[Pair]) -> Batch:
        """A micro-batch of these, on the student's device."""
        collate = wait if self.answers.generates else self.dataset.collator
        (taken,) = self.answers.take(iter([collate(list(pairs))]), 1)
        return taken["batch"].to(self.student.device)

    @property
    def collator(self) -> Callable[[Any], dict[str, Any]]:
        """Of what the loader reads, what the answer source takes: a micro-batch, or all those of a step where tokens tell."""
        tokens = self.spec.optimiser.micro_batch_tokens
        own = self.dataset.collator if tokens is None else ByTokens(self.dataset.collator, tokens)
        return wait if self.answers.generates else own

    def leave(self) -> None:
        """Takes away what only this stage adds to its student, for who does not train it."""
        if self.spec.lora is not None:
            remove_lora(self.student)
        release(self.student)

    def settle(self) -> None:
        """Makes its trained student what will be saved: with quantised weights where the stage says so."""
        settle(self.student)


def build_stage(
    name: str, spec: StageSpec, settings: TrainSpec, student: Tower, teachers: Mapping[str, Teacher] | Teacher | Tower | None,
    samples: Sequence[Sample],
) -> Stage:  # fmt: skip
    """Puts a stage together on `student`, which is changed. Raises DataError, TowerError."""
    terms, teachers = spec.build_terms(), as_teachers(teachers)
    needed = {n: teacher for n, teacher in teachers.items() if terms_of_teacher(terms, n, teachers)}
    student, receipt = upcycled(spec, student, settings.seed)
    if spec.lora is not None:
        add_lora(student, spec.lora)
    set_trainable(student, spec)
    for teacher in needed.values():
        teacher.begin(student)
    quantised = fake_quantise(student, **spec.quantise.model_dump()) if spec.quantise else None  # behind: no teacher's copy is
    kind = PreferenceDataset if any(t.needs_pairs for t in terms) else PairDataset
    skipped = allowance(settings.guards.max_skipped, len(samples))
    if spec.generates:
        refuse_stored([*needed.values()])
    options = {"max_skipped": skipped, "workers": settings.workers, "generates": spec.generates}
    dataset = kind(samples, student, needed, terms, **options)
    answers = answer_source(spec.answers, Rollouts(dataset, settings.seed))
    distiller = Distiller(student, needed, terms, chunk_bytes=settings.chunk_bytes, compiled=settings.compile)
    return Stage(name, spec, student, needed, terms, dataset, distiller, answers, receipt, quantised)


def check_steps(stage: Stage, micro_batches: int, processes: int) -> None:
    """Raises DataError for terms that cannot have steps of so many micro-batches and processes."""
    wrong = [f"terms.{t.name}.{error}" for t in stage.terms for error in t.check_step(micro_batches, processes)]
    if wrong:
        raise DataError("; ".join(wrong))
