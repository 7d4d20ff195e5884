"""What terms that learn from several teachers at once share: a weight for each teacher at each row, and what each one brought.

The weights of a row add up to 1, so the loss is a mean over rows as that of one teacher is. With forward KL it has the gradient
of the KL to the weighted mean of the teachers' distributions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.engine.rows import row_log_probs, row_losses, row_values
from mmkd.errors import TowerError, did_you_mean
from mmkd.registry import registry
from mmkd.teachers.teacher import Gives, check_vocabularies
from mmkd.terms.coupled import head_logits
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Rows, RowTerm, Term

TOLD = 64  # rows of a micro-batch on which agreement and lead are measured
FACTS = ("weight", "used", "agreement", "lead")  # what the log tells of each teacher, as TERM.TEACHER.FACT


@dataclass(frozen=True)
class TeacherMixture(Term):
    """A divergence to several teachers, weighted row by row.

    teachers: their names.  divergence: a row term that compares with a teacher, at its own defaults.
    """

    needs: ClassVar[tuple[str, ...]] = ("student.rows", "teacher.rows")

    teachers: Any = ()
    divergence: str = "forward_kl"

    @abstractmethod
    def weights(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows]) -> Tensor:
        """The weight of each teacher at each row, [M, R]; with gradient where the term learns them.

        views, rows: of each teacher, `signals.of` and its "student.rows".
        """

    @property
    def several(self) -> tuple[str, ...]:
        return tuple(self.teachers)

    @property
    def count(self) -> str:  # type: ignore[override]
        return self.positions

    @property
    def teacher_positions(self) -> frozenset[str]:
        return frozenset({self.positions})

    @cached_property
    def inner(self) -> RowTerm:
        """The divergence itself."""
        return registry("terms").get(self.divergence)(place=replace(self.place, kind=self.divergence, teacher=None))

    def errors(self) -> list[str]:
        known = registry("terms")
        if self.divergence not in known:
            return [f"divergence {self.divergence!r} is no term; {did_you_mean(self.divergence, known)}"]
        kind, found = known.get(self.divergence), []
        own = (RowTerm.extra, RowTerm.extras, RowTerm.row_weights, Term.step_sums)
        simple = issubclass(kind, RowTerm) and all(getattr(kind, method.__name__) is method for method in own)
        if not (simple and kind.teacher_logits):
            found.append(f"divergence {self.divergence}: it must be a row term that compares logits, such as jsd")
        names = self.several if isinstance(self.teachers, list | tuple | dict) else ()
        if len(names) < 2 or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            found.append(f"teachers is {self.teachers!r}; name two or more of the recipe's `teachers`, each once")
        return found

    def check(self, pair: Pair) -> list[str]:
        found = [f"there is no teacher {name!r}" for name in self.several if name not in pair.teachers]
        for name in (name for name in self.several if name in pair.teachers):
            try:
                check_vocabularies(pair.student, pair.teachers[name].body)
            except TowerError as error:
                found.append(f"{name}: {error}")
        return found

    def refusal(self, gives: Gives) -> str | None:
        return self.inner.refusal(gives)

    def loss(self, signals: Signals) -> Tensor:
        views = [signals.of(name) for name in self.several]
        rows = [view["student.rows"] for view in views]
        if not len(rows[0].targets):  # the log has the same names in every process
            for name, fact in ((name, fact) for name in self.several for fact in FACTS):
                signals.observe(f"{self.name}.{name}.{fact}", signals.zero, signals.zero)
            return rows[0].student.sum() * 0.0 + self.dummy(signals, rows[0].student)
        weights = self.weights(signals, views, rows)
        total, values = signals.zero, []
        for view, own, weight in zip(views, rows, weights, strict=True):
            term = self.inner.engine_term(own, 1.0, view)
            theirs = teacher_arguments(view, own) if term.needs_teacher else {}
            options = {**theirs, "vocabulary": view.vocabulary, "chunk_bytes": signals.chunk_bytes}
            given = (own.student_head, own.targets)
            total = total + row_losses(own.student, *given, [replace(term, row_weights=weight.detach())], **options)[0]
            if weights.requires_grad:  # what each teacher costs, for whoever weighs them
                values.append(row_values(own.student.detach(), *given, term.loss, extra=term.extra, **options))
        if values:
            by_weight = (weights * torch.stack(values)).sum()
            total = total + by_weight - by_weight.detach()
        self._tell(signals, views, rows, weights.detach())
        return total

    @torch.no_grad()
    def _tell(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows], weights: Tensor) -> None:
        """Into the log: each teacher's mean weight and, where its weight is the largest, how often the student's likeliest token
        is the teacher's, and how much likelier the teacher finds the token that follows."""
        first = slice(0, TOLD)
        own = rows[0]
        logits = head_logits(own.student_head, own.student[first], signals.vocabulary)
        targets = own.targets[first].clamp(0, signals.vocabulary - 1)
        said = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        best, chosen = logits.argmax(-1), weights[:, first].argmax(0)
        for number, (name, view, other) in enumerate(zip(self.several, views, rows, strict=True)):
            used = (chosen == number).float()
            agrees = (likeliest_token(view, other, first) == best).float()
            lead = target_log_probs(view, other, first) - said
            signals.observe(f"{self.name}.{name}.weight", weights[number].sum(), signals.counts[self.count])
            signals.observe(f"{self.name}.{name}.used", used.sum(), torch.tensor(float(len(used))))
            signals.observe(f"{self.name}.{name}.agreement", (agrees * used).sum(), used.sum())
            signals.observe(f"{self.name}.{name}.lead", (lead * used).sum(), used.sum())


def teacher_arguments(view: Signals, rows: Rows) -> dict[str, Any]:
    return {"teacher_hidden": rows.teacher["hidden"], "teacher_head": view.teacher.head}


def likeliest_token(view: Signals, rows: Rows, part: slice) -> Tensor:
    """The teacher's likeliest token of some rows. [r]"""
    if "hidden" not in rows.teacher:
        return rows.teacher["ids"][part, 0].long()
    return head_logits(view.teacher.head, rows.teacher["hidden"][part], view.vocabulary).argmax(-1)


@torch.no_grad()
def target_log_probs(view: Signals, rows: Rows, part: slice = slice(None)) -> Tensor:
    """The teacher's log-probability of the token that each row predicts; beyond its top k an equal share of the rest. [r]"""
    targets = rows.targets[part].clamp(0, view.vocabulary - 1)
    if "hidden" in rows.teacher:
        hidden, head = rows.teacher["hidden"][part], view.teacher.head
        return row_log_probs(hidden, head, targets, vocabulary=view.vocabulary, chunk_bytes=view.chunk_bytes)
    ids, known, tail = (rows.teacher[name][part] for name in ("ids", "log_probs", "tail"))
    rest = tail.float() - torch.tensor(float(max(1, view.vocabulary - ids.shape[1]))).log()
    found = ids == targets[:, None]
    return torch.where(found.any(-1), (known.float() * found).sum(-1), rest)


@torch.no_grad()
def entropies(view: Signals, rows: Rows) -> Tensor:
    """The entropy of the teacher's distribution at each row; of a top k with all other tokens as one entry. [R]"""
    if "hidden" not in rows.teacher:
        logs = torch.cat([rows.teacher["log_probs"], rows.teacher["tail"][:, None]], -1).float()
        return -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
    options = {"vocabulary": view.vocabulary, "chunk_bytes": view.chunk_bytes}
    return row_values(rows.teacher["hidden"], view.teacher.head, rows.targets, _entropy(), **options)


def _entropy() -> Callable[..., Tensor]:
    def loss(logits: Tensor, _teacher: Tensor | None, _targets: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)

    return loss
