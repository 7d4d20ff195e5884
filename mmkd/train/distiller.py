"""The distiller: one module that holds the student and the terms, and turns a batch into a loss.

    signals: the union of what the terms need, each computed at most once
    terms:   weight * sum / global count

Hidden states are gathered at the rows that the terms name before either head is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmkd.engine.compiled import check_compiler
from mmkd.engine.positions import counts_by_name
from mmkd.engine.rows import row_losses
from mmkd.errors import TowerError
from mmkd.teachers.live import SignalsAhead, as_teachers
from mmkd.teachers.teacher import Teacher, check_vocabularies
from mmkd.terms.term import Pair, Rows, RowTerm, Term, teacher_name, teacher_names, terms_of_teacher
from mmkd.towers.experts import sparse_blocks
from mmkd.towers.tower import Tower
from mmkd.train.batch import Batch
from mmkd.train.preference import PairSignals
from mmkd.train.sharded import zero_of_parameters
from mmkd.train.signals import BatchSignals, TermSignals

Log = dict[str, tuple[Tensor, Tensor]]  # by term: (sum, count)


class Distiller(nn.Module):
    """Student and terms as one module, so that whatever wraps it (DDP, FSDP, DeepSpeed) sees the heads used inside.

    Teachers are kept out of the module tree: they are never trained, sharded with the student, or saved.
    Raises TowerError for terms that this student and these teachers cannot have.
    """

    def __init__(
        self, student: Tower, teachers: Mapping[str, Teacher] | Teacher | Tower | None, terms: Sequence[Term], *,
        chunk_bytes: int = 256 * 2**20, compiled: bool = False,
    ):  # fmt: skip
        super().__init__()
        teachers = as_teachers(teachers)
        if wrong := term_errors(student, teachers, terms):
            raise TowerError("; ".join(wrong))
        self.student = student.model
        self._no_split_modules = student.model._no_split_modules  # the layers that FSDP2 shards one by one
        self.terms = tuple(terms)
        self.chunk_bytes, self.compiled = chunk_bytes, compiled
        if compiled:
            check_compiler(student.device)
        self.lockstep = False  # all processes must go through the same modules in one order, with pictures or without
        self.routed: dict[int, Tensor] = {}  # of the last batch: places that each expert got, by layer, each [E]
        self._towers = (student, teachers)
        self._groups = self._row_groups()
        pairs = {t.name: Pair(student, teachers.get(teacher_name(t, teachers)), teachers=teachers) for t in self.terms}
        self._prepared = {t.name: t.prepare(pairs[t.name]) for t in self.terms}
        # What a term trains or carries beside the student; it goes into checkpoints, not into the saved student.
        self.extras = nn.ModuleDict({t.name: m for t in self.terms if (m := t.extra(pairs[t.name])) is not None})
        self.extras.to(student.device)

    @property
    def tower(self) -> Tower:
        return self._towers[0]

    @property
    def teachers(self) -> dict[str, Teacher]:
        return self._towers[1]

    def train(self, mode: bool = True) -> Distiller:
        """Frozen parts stay in evaluation mode: no dropout, no moving batch statistics."""
        super().train(mode)
        for part in (self.tower.vision, self.tower.projector, self.tower.language):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(
        self, batch: Batch, counts: Tensor | None = None, progress: Tensor | float = 0.0, step_sums: bool = False
    ) -> tuple[Tensor, Log] | dict[str, Tensor]:
        """The loss of a (micro-)batch and, per term, (sum, count) for the log.

        counts: [len(COUNTS)] global counts over ranks and accumulation steps; the batch's own when None.
        progress: 0..1 of the stage, for scheduled weights.
        step_sums: instead what terms must know of the whole step, summed over this micro-batch (`Term.step_sums`).
        """
        own, progress = counts_by_name(batch.counts), float(progress)
        divisors = {name: n.clamp(min=1) for name, n in (own if counts is None else counts_by_name(counts)).items()}
        signals = self.signals(batch)
        views = {t.name: TermSignals(signals, t, self._prepared[t.name], divisors, progress) for t in self.terms}
        if step_sums:
            return {t.name: t.step_sums(views[t.name]) for t in self.terms if t.has_step_sums}
        total = signals.zero if batch.student.pixels else self._unreached(signals)
        log: Log = {}
        for path, teacher, terms in self._groups:
            rows = signals.switch_rows(terms, teacher) if path == "switch" else signals.student_rows(terms, teacher)
            if rows is None:  # no picture in this micro-batch: nothing was switched
                total = total + sum((self._dummy(signals, views[t.name], t) for t in terms), signals.zero)
                continue
            part, sums = row_losses(**self._row_arguments(signals, views, rows, teacher, terms, divisors))
            total = total + part
            log |= {t.name: (sums[t.name], own[t.count]) for t in terms}
        for term in (t for t in self.terms if not t.is_row_term):
            value = term.loss(views[term.name])
            if signals.dummy is not None:
                value = value + self._dummy(signals, views[term.name], term)
            total = total + term.place.weight.at(progress) * value / float(divisors[term.count])
            log[term.name] = (value.detach(), own[term.count])
        self.routed = signals.routed()
        return total, log | signals.observed

    def signals(self, batch: Batch) -> BatchSignals:
        kind = PairSignals if any(t.needs_pairs for t in self.terms) else BatchSignals
        return kind(
            self.tower, self.teachers, self.terms, self.extras, batch, lockstep=self.lockstep, chunk_bytes=self.chunk_bytes
        )

    def prefetch(self, batch: Batch) -> Batch:
        """The batch with the live teachers' own passes over it, as the terms of this distiller need them."""
        return replace(batch, teachers={name: self._prefetched(batch, name) for name in batch.teachers})

    def _prefetched(self, batch: Batch, name: str) -> Any:
        signals, part = self.signals(batch), batch.teachers[name]
        shared = not self.lockstep and signals.shares_encoder(name)  # in lockstep every process runs the student's encoder itself
        reads = any(set(t.needs) & {"teacher.rows", "teacher.hidden", "teacher.visual_rows"} for t in
                    terms_of_teacher(self.terms, name, self.teachers))
        said = self.teachers[name].say(part.inputs, batch.on_host.teachers[name].inputs)
        return replace(part, ahead=SignalsAhead(said.seen, said.hidden() if reads else None, shared, said.host))

    def _unreached(self, signals: BatchSignals) -> Tensor:
        """0, attached to what a micro-batch without pictures does not reach: data-parallel wrappers wait for the gradient of
        every trained parameter."""
        if signals.dummy is None:
            return zero_of_parameters(self)
        return sum(tokens.sum() for tokens in signals.dummy.tokens) * 0.0

    def _dummy(self, signals: BatchSignals, view: TermSignals, term: Term) -> Tensor:
        if signals.dummy is None or term.name not in self.extras:
            return signals.zero
        return term.dummy(view, signals.dummy.features[0])

    def _row_groups(self) -> list[tuple[str, str | None, list[RowTerm]]]:
        """(path, teacher, row terms) of those that share hidden rows, logits and chunks. A term without a teacher goes with the
        first group."""
        groups: dict[tuple[str, str | None], list[RowTerm]] = {}
        compared = [t for t in self.terms if t.is_row_term and t.needs_teacher and not t.switched]
        first = next((teacher_name(t, self.teachers) for t in compared), None)
        for path in ("student", "switch"):
            for term in (t for t in self.terms if t.is_row_term and t.switched == (path == "switch")):
                teacher = teacher_name(term, self.teachers) if term.needs_teacher else first
                groups.setdefault((path, teacher), []).append(term)
        return [(path, teacher, terms) for (path, teacher), terms in groups.items()]

    def _row_arguments(
        self, signals: BatchSignals, views: dict[str, TermSignals], rows: Rows, teacher: str | None, terms: list[RowTerm],
        divisors: dict[str, Tensor],
    ) -> dict[str, Any]:  # fmt: skip
        """What the row engine gets for a group of terms."""
        # The engine multiplies sums by a number; a divisor on the device would cost a host synchronisation a term.
        scale = {t.name: t.place.weight.at(views[t.name].progress) / float(divisors[t.count]) for t in terms}
        engine_terms = [t.engine_term(rows, scale[t.name], views[t.name]) for t in terms]
        needs_teacher = any(t.needs_teacher for t in engine_terms)
        return {
            "student_hidden": rows.student,
            "student_head": rows.student_head,
            "targets": rows.targets,
            "terms": engine_terms,
            "teacher_hidden": rows.teacher["hidden"] if needs_teacher else None,
            "teacher_head": self.teachers[teacher].head if needs_teacher else None,
            "vocabulary": signals.vocabulary(teacher),
            "chunk_bytes": self.chunk_bytes,
            "compiled": self.compiled,
        }


def term_errors(
    student: Tower, teachers: Mapping[str, Teacher], terms: Sequence[Term], *, sparse: bool | None = None
) -> list[str]:
    """What makes some terms impossible for a student and its teachers, each with the term's name.

    sparse: whether the student has experts; None to look.
    """
    sparse = bool(sparse_blocks(student)) if sparse is None else sparse
    wrong: list[str] = []
    for term in terms:
        teacher = teachers.get(teacher_name(term, teachers))
        pair = Pair(student, teacher, sparse, teachers)
        found = term.check(pair)
        for name in teacher_names(term, teachers) if term.reads_teacher else ():
            if name in teachers and (why := term.refusal(teachers[name].gives)) is not None:
                found = [*found, why]
        wrong += [f"{term.name}: {error}" for error in found]
    for name, teacher in teachers.items():
        if any(t.is_row_term and t.needs_teacher for t in terms_of_teacher(terms, name, teachers)):
            try:
                check_vocabularies(student, teacher.body)
            except TowerError as error:
                wrong.append(str(error))
    if len({teacher_name(t, teachers) for t in terms if t.switched}) > 1:
        wrong.append("the visual switch goes through one teacher a stage; give all terms with `path: switch` the same `teacher`")
    return wrong
