"""What the terms compare, for one batch: each pass runs at most once and only if it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmkd import losses
from mmkd.engine.positions import any_of, counts_by_name, gathered, image_rows, rows_at, spread
from mmkd.engine.rows import Head
from mmkd.errors import TowerError
from mmkd.teachers.teacher import Teacher, TeacherSignals, head_of
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows, Term, teacher_name, teacher_names
from mmkd.towers.experts import Routing, recorded_routing
from mmkd.towers.tower import Seen, Tower, TowerInputs
from mmkd.train.batch import Batch
from mmkd.train.sharded import dummy_forward


class BatchSignals:
    """The passes of student and teachers over one batch."""

    def __init__(
        self, student: Tower, teachers: Mapping[str, Teacher], terms: tuple[Term, ...], extras: Mapping[str, nn.Module],
        batch: Batch, *, lockstep: bool, chunk_bytes: int,
    ):
        self.student, self.teachers, self.terms, self.extras, self.batch = student, teachers, terms, extras, batch
        self.lockstep, self.chunk_bytes = lockstep, chunk_bytes
        self.observed: dict[str, tuple[Tensor, Tensor]] = {}  # what else goes into the log: name -> (sum, count)
        self._said: dict[str, TeacherSignals] = {}

    @property
    def zero(self) -> Tensor:
        return torch.zeros((), device=self.batch.student.input_ids.device)

    def vocabulary(self, teacher: str | None) -> int:
        """Columns that both heads share: the tokenizer's length, so that padding rows of a head never matter."""
        sizes = [self.student.vocabulary, self.student.head.weight.shape[0]]
        of_teacher = [t for t in self.terms if teacher in teacher_names(t, self.teachers)]
        if teacher in self.teachers and any(t.asks("teacher.rows") for t in of_teacher):
            other = self.teachers[teacher]
            sizes += [other.vocabulary, other.head.weight.shape[0]]
        return min(sizes)

    # ---- the student's passes ----

    @cached_property
    def dummy(self) -> Seen | None:
        """A dummy forward pass, by which a micro-batch without pictures keeps step with those of other processes."""
        return dummy_forward(self.student) if self.lockstep and not self.batch.student.pixels else None

    @cached_property
    def seen(self) -> Seen:
        shared = next((part.ahead for part in self.batch.teachers.values() if getattr(part.ahead, "shared", False)), None)
        if shared is not None:
            features = shared.features()
            return Seen(features, self.student.project(features))
        return self.student.see(self.batch.student)

    @cached_property
    def _read(self) -> tuple[Tensor, dict[int, Routing]]:
        _ = self.dummy  # also in a pass for sums over the step (`Term.step_sums`) the processes keep step
        with recorded_routing(self.student) as routing:
            return self.student.read(self.batch.student, self.seen), routing  # [B, L, Ds]

    def hidden(self) -> Tensor:
        return self._read[0]

    def visual_rows(self) -> list[Tensor]:
        return image_rows(self.hidden(), self.batch.on_host.student)

    def routing(self) -> list[tuple[TowerInputs, dict[int, Routing]]]:
        """Each reading with its routing by layer."""
        return [(self.batch.student, self._read[1])]

    def routed(self) -> dict[int, Tensor]:
        """Places that each expert got, padding left out, by layer; empty when no term read through a sparse student."""
        if "_read" not in self.__dict__:
            return {}
        mask = self.batch.student.attention_mask.flatten().bool()
        return {layer: routing.tokens(mask) for layer, routing in self._read[1].items()}

    def gram(self, teacher: str | None) -> Tensor:
        """Gram matrix of the student's head over the vocabulary that it shares with a teacher."""
        grams = self.__dict__.setdefault("_grams", {})
        size = self.vocabulary(teacher)
        if size not in grams:
            grams[size] = _gram(head_of(self.student), size)
        return grams[size]

    # ---- the teachers' passes ----

    def said(self, name: str) -> TeacherSignals:
        """What a teacher says of the batch."""
        if name not in self._said:
            part, teacher = self.batch.teachers[name], self.teachers[name]
            self._said[name] = part.ahead if part.ahead is not None else teacher.say(
                part.inputs,
                self.batch.on_host.teachers[name].inputs,
                shared=self.seen if self.shares_encoder(name) else None,
                differentiable=any(t.switched for t in self.terms),
            )
        return self._said[name]

    def shares_encoder(self, name: str) -> bool:
        """Whether one pass of the vision encoder serves student and teacher."""
        inputs = self.batch.teachers[name].inputs
        return inputs is self.batch.student and self.teachers[name].shares_encoder(self.student, inputs)

    def teacher_gram(self, name: str) -> Tensor:
        """Gram matrix of a teacher's head, computed once."""
        kept = self.teachers[name].body.__dict__.setdefault("_grams", {})
        size = self.vocabulary(name)
        if size not in kept:
            with torch.no_grad():
                kept[size] = _gram(self.teachers[name].head, size)
        return kept[size]

    def switch_hidden(self, name: str) -> Tensor:
        """The teacher's projector and language model on the student's vision features; gradient into the encoder only."""
        features, tower = self.seen.features, self.teachers[name].running()
        bridge = next((self.extras[t.name] for t in self.terms if t.switched and t.name in self.extras), None)
        if bridge is not None:
            features = [bridge(f, len(f)) for f in features]
        return tower.read(self.batch.teachers[name].switch, tower.project(features))  # [Bi, Ls, Dt]

    # ---- rows ----

    def student_rows(self, terms: list[Term], teacher: str | None) -> Rows:
        """Rows at the positions that some row terms name, and the teacher's where one of them compares with it."""
        inputs = self.batch.on_host.student
        places = {name: rows_at(inputs, name) for name in sorted({t.positions for t in terms})}  # each [B, L]
        where = any_of(places.values())
        masks = {name: place[where] for name, place in places.items()}  # each [R]
        targets = torch.where(inputs.response, inputs.targets, inputs.next_ids)[where]
        _ = self.seen  # first in every process: they gather their shards in one order
        # Before the student's pass, whose activations stay: the teacher's are gone by then.
        theirs = self._teacher_rows(terms, masks, teacher)
        return Rows(
            gathered(self.hidden(), where), head_of(self.student), theirs, targets.to(self.zero.device, non_blocking=True),
            masks, where.nonzero()[:, 0],
        )  # fmt: skip

    def _teacher_rows(self, terms: list[Term], masks: dict[str, Tensor], teacher: str | None) -> dict[str, Tensor]:
        """What the teacher says on the rows where a term compares with it, 0 in other rows of the student; each [R, ...]."""
        compared = {t.positions for t in terms if t.needs_teacher}
        if not compared:
            return {}
        where = any_of(masks[name] for name in compared)
        return {name: spread(rows, where) for name, rows in self.said(teacher).rows(compared).items()}

    def switch_rows(self, terms: list[Term], teacher: str) -> Rows | None:
        """Rows of the samples with pictures: switched against ordinary teacher; None without pictures."""
        if self.batch.teachers[teacher].switch is None:
            return None
        inputs = self.batch.on_host.teachers[teacher].switch
        positions = {t.positions for t in terms}
        places = {name: rows_at(inputs, name) for name in sorted(positions)}  # each [Bi, Ls]
        where = any_of(places.values())
        targets = torch.where(inputs.response, inputs.targets, inputs.next_ids)[where]
        pictured = [n > 0 for n in self.batch.student.images]
        return Rows(
            gathered(self.switch_hidden(teacher), where), self.teachers[teacher].head,
            self.said(teacher).rows(positions, pictured), targets.to(self.zero.device, non_blocking=True),
            {name: place[where] for name, place in places.items()}, where.nonzero()[:, 0],
        )  # fmt: skip


class TermSignals(Signals):
    """What one term sees of a batch."""

    # How a signal is computed: (the batch's signals, name of the term's teacher) -> value.
    ways: Mapping[str, Callable[[Any, str], Any]] = {
        "student.hidden": lambda own, name: own.hidden(),
        "student.visual_rows": lambda own, name: own.visual_rows(),
        "student.features": lambda own, name: own.seen.features,
        "student.tokens": lambda own, name: own.seen.tokens,
        "student.gram": lambda own, name: own.gram(name),
        "student.routing": lambda own, name: own.routing(),
        "teacher.hidden": lambda own, name: own.said(name).hidden(),
        "teacher.visual_rows": lambda own, name: own.said(name).visual_rows(),
        "teacher.features": lambda own, name: own.said(name).features(),
        "teacher.gram": lambda own, name: own.teacher_gram(name),
        "pair.log_probs": lambda own, name: own.log_probs,
        "pair.reference": lambda own, name: own.reference,
    }

    def __init__(self, own: BatchSignals, term: Term, prepared: Any, divisors: Mapping[str, Tensor], progress: float):
        self._own, self._term = own, term
        self.extra = own.extras[term.name] if term.name in own.extras else None  # noqa: SIM401  a ModuleDict has no get
        self.prepared, self.progress = prepared, progress
        self.student, self.inputs = own.student, own.batch.on_host.student
        self.facts = own.batch.on_host.facts.get(term.name, ())
        self._beside(teacher_name(term, own.teachers))
        self.global_counts, self.chunk_bytes = divisors, own.chunk_bytes
        self.step_sums = own.batch.on_host.step_sums.get(term.name)  # a batch moved ahead of its step has none of its own

    def _beside(self, teacher: str) -> None:
        self._name, self.teacher = teacher, self._own.teachers.get(teacher)
        part = self._own.batch.on_host.teachers.get(teacher)
        self.teacher_inputs = part.inputs if part is not None else None

    def of(self, teacher: str) -> TermSignals:
        other = copy.copy(self)
        other.__dict__.pop("_rows", None)
        other._beside(teacher)
        return other

    def __getitem__(self, name: str) -> Any:
        if name not in self._term.needs:
            raise TowerError(f"term {self._term.name!r} reads {name!r}, which is not in its `needs` {self._term.needs}")
        if name in ("student.rows", "teacher.rows"):
            return self._rows
        return self.ways[name](self._own, self._name)

    @cached_property
    def _rows(self) -> Rows:
        return self._own.student_rows([self._term], self._name)

    def observe(self, name: str, total: Tensor, count: Tensor) -> None:
        self._own.observed[name] = (total, count)

    @property
    def counts(self) -> dict[str, Tensor]:  # type: ignore[override]
        return counts_by_name(self._own.batch.counts)

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        return self._own.vocabulary(self._name)

    @property
    def device(self) -> torch.device:
        return self._own.zero.device


def _gram(head: Head, columns: int) -> Tensor:
    return losses.head_gram(head.weight[:columns], None if head.bias is None else head.bias[:columns])


