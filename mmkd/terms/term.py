"""A term of the training loss: a declared object that says what it needs and gives a sum.

A new method is one class in one file of this package, or in a module of a user's own:

    @register("terms", "total_variation")
    @dataclass(frozen=True)
    class TotalVariation(RowTerm):
        '''Half the L1 distance of the two distributions.'''

        temperature: float = 1.0          # fields are the options of a recipe

        def row_loss(self, signals=None):
            return lambda student, teacher, targets: ...     # [r, V], [r, V], [r] -> [r]

Nobody outside a term's own file knows its name: the distiller, the checks before step 1, caches, the plan and the estimate ask
the declarations below.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from mmkd.engine import rows as engine
from mmkd.teachers.teacher import Gives, Teacher
from mmkd.terms.bridge import Bridge
from mmkd.terms.signals import Signals
from mmkd.towers.samples import Sample
from mmkd.towers.tower import Tower

TARGETED = ("response", "prompt", "text", "given", "generated")  # kinds of rows that have a target


@dataclass(frozen=True)
class Schedule:
    """Weight over a stage: linear from `start` to `end` over the first `over` (share of the stage's steps)."""

    start: float
    end: float
    over: float = 1.0

    def at(self, progress: float) -> float:
        """The weight at `progress` in 0..1 of the stage."""
        reached = 1.0 if self.over <= 0 else min(1.0, progress / self.over)
        return self.start + (self.end - self.start) * reached


@dataclass(frozen=True)
class Place:
    """Where a recipe puts a term.

    name: what it is called in logs and on the command line.  kind: its name in the registry.
    positions: the positions whose rows count.  path: whose rows they are, the student's or those of the visual switch.
    bridge: for the switch, whether a trained linear map may stand between encoders of different width.
    reduction: of a row term, "mean" over its rows, or their "sum" in each sample and the mean over samples.
    teacher: the name of the teacher that it compares with; None for the only one.
    """

    name: str = ""
    kind: str = ""
    weight: Schedule = Schedule(1.0, 1.0)
    positions: str = "response"
    path: str = "student"
    bridge: bool = False
    reduction: str = "mean"
    teacher: str | None = None


@dataclass(frozen=True)
class Pair:
    """What a term is checked against before step 1.

    teacher: the one that the term compares with, the first of several.  sparse: whether the student has experts in this stage.
    """

    student: Tower
    teacher: Teacher | None
    sparse: bool = False
    teachers: Mapping[str, Teacher] = field(default_factory=dict)  # all of the stage by name, for terms that read several


@dataclass(frozen=True)
class Term:
    """One term of one stage. Subclasses are frozen dataclasses; their fields are the options that a recipe may set."""

    place: Place = field(default=Place(), kw_only=True, repr=False)

    not_options: ClassVar[tuple[str, ...]] = ("place",)
    needs: ClassVar[tuple[str, ...]] = ()  # names of mmkd.terms.signals.SIGNALS
    count: ClassVar[str] = "sample"  # which global count divides the sum, see mmkd.engine.positions
    same_tokens: ClassVar[bool] = True  # student and teacher must predict the same answer tokens
    default_weight: ClassVar[float] = 1.0  # the paper's, where a recipe gives none
    memory_factor: ClassVar[int] = 6  # float32 tensors [rows, V] that a naive computation keeps beside the logits
    origin: ClassVar[str] = ""  # paper and equation, for the table of methods
    example: ClassVar[Mapping[str, Any]] = {}  # options that it cannot do without, as a table of terms shows it
    status: ClassVar[str] = ""  # "confirmed" by the origin, or "our choice: ..." of what it leaves open

    # ---- what is asked ----

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def kind(self) -> str:
        return self.place.kind

    def asks(self, signal: str) -> bool:
        """Whether it needs a signal, or any of a side ("teacher")."""
        return any(need == signal or need.partition(".")[0] == signal for need in self.needs)

    @property
    def needs_teacher(self) -> bool:
        """Whether the SFT control, which has no teacher, must do without it."""
        return self.asks("teacher") or self.asks("switch") or self.asks("pair")

    @property
    def needs_pairs(self) -> bool:
        """Whether it compares a chosen with a rejected answer; its teacher is then a kept reference, not a live one."""
        return self.asks("pair")

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher must give something in each step."""
        return self.asks("teacher") or self.asks("switch")

    @property
    def is_row_term(self) -> bool:
        return False

    @property
    def reads_logits(self) -> bool:
        """Whether logits of rows are made for it."""
        return self.asks("student.rows") or self.switched or self.needs_pairs

    @property
    def switched(self) -> bool:
        return self.asks("switch")

    @property
    def compares_features(self) -> bool:
        """Whether features of one tower stand beside, or in the place of, the other's."""
        return self.asks("teacher.features") or self.switched

    @property
    def positions(self) -> str:
        return self.place.positions

    @property
    def several(self) -> tuple[str, ...]:
        """The names of the teachers of a term that reads more than one, by `signals.of(name)`."""
        return ()

    @property
    def has_sample_fact(self) -> bool:
        """Whether `sample_fact` is asked of each sample."""
        return type(self).sample_fact is not Term.sample_fact

    def sample_fact(self, sample: Sample) -> Any:
        """What it must know of a sample beside its tokens; read as `signals.facts`, one a sample of the batch. Raises SampleError
        for a sample that must be left out."""
        return None

    @property
    def learns_answers(self) -> bool:
        """Whether it takes the tokens of answers for right, as those of the data are and the student's own are not."""
        return False

    @property
    def teacher_positions(self) -> frozenset[str]:
        """Kinds of rows at which it reads the teacher."""
        return frozenset({"visual"} if self.asks("teacher.visual_rows") else ())

    @property
    def visual_counts_agree(self) -> bool:
        """Whether both towers must have as many visual tokens."""
        return bool(self.teacher_positions & {"visual", "all"})

    # ---- what a method fills in ----

    def errors(self) -> list[str]:
        """What is wrong with its options or its place, known from the recipe alone."""
        return []

    def check(self, pair: Pair) -> list[str]:
        """What makes it impossible for this student, teacher and stage; said before step 1."""
        return []

    def check_step(self, micro_batches: int, processes: int) -> list[str]:
        """What makes it impossible in steps of so many micro-batches and processes."""
        return []

    def refusal(self, gives: Gives) -> str | None:
        """Why a teacher that gives no more than this cannot serve it; None if it can.

        The default compares `needs` with what is given; a term overrides it to add a reason of its own.
        """
        return gives.lacks(self.needs, self.teacher_positions)

    def extra(self, pair: Pair) -> nn.Module | None:
        """What it trains (parameters) or carries from step to step (buffers) beside the student; saved in checkpoints."""
        return None

    def prepare(self, pair: Pair) -> Any:
        """What it computes once from the two towers (an alignment of tokenizers); read as `signals.prepared`."""
        return None

    def loss(self, signals: Signals) -> Tensor:
        """The sum that `count` divides. A scalar with gradient to the student and to `extra`."""
        raise TypeError(f"{type(self).__name__} is no loss of whole samples; it is computed by the row engine")

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        """A zero loss that still uses the parameters of `extra`, for a micro-batch without pictures among processes that
        keep step. features: of a black picture, [n, Dv]."""
        return sum((p.sum() * 0.0 for p in signals.extra.parameters()), signals.zero) if signals.extra else signals.zero

    @property
    def has_step_sums(self) -> bool:
        """Whether `step_sums` is asked before a step, in evaluation mode."""
        return type(self).step_sums is not Term.step_sums

    def step_sums(self, signals: Signals) -> Tensor:
        """What the term must know of the whole step before its loss: sums over this micro-batch, without gradient. [k]

        They are added up over micro-batches and processes and read as `signals.step_sums`; None there where the batch is the
        whole step and the student computes in training what it computes in evaluation mode.
        """
        raise TypeError(f"{type(self).__name__} has no sums over a step")

    @property
    def has_state(self) -> bool:
        """Whether `update` is called after each optimiser step."""
        return type(self).update is not Term.update

    @property
    def followed(self) -> str:
        """What in the log `update` gets the mean of: the term itself, or what it observes (`signals.observe`)."""
        return self.name

    def update(self, extra: nn.Module, mean: float, progress: float) -> None:
        """After each optimiser step with rows of the term, with its mean over the whole step: the same number on all ranks."""


@dataclass(frozen=True)
class RowTerm(Term):
    """A loss on logit rows, computed by the row engine (`mmkd/engine/rows.py`) together with the others of its group."""

    teacher_logits: ClassVar[bool] = True  # compares with the teacher's logits
    reads_targets: ClassVar[bool] = False  # also where it compares: what it does depends on the token that a row predicts

    @property
    def is_row_term(self) -> bool:
        return True

    @property
    def learns_answers(self) -> bool:
        return self.positions != "prompt" and (self.reads_targets or not self.teacher_logits)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        own = ("switch.rows", "student.features") if self.place.path == "switch" else ("student.rows",)
        return (*own, "teacher.rows") if self.teacher_logits else own

    @property
    def count(self) -> str:  # type: ignore[override]
        place = self.place
        if place.reduction == "sum":
            return "pictured" if place.path == "switch" else "sample"
        if place.path == "switch":
            return "switch" if place.positions == "response" else f"switch_{place.positions}"
        return place.positions

    @property
    def teacher_positions(self) -> frozenset[str]:
        return frozenset({self.positions} if self.teacher_logits else ())

    def errors(self) -> list[str]:
        """Where its rows have no target or cannot be switched, and what its loss refuses of the options."""
        found, place = [], self.place
        if self.place.path == "switch" and not self.teacher_logits:
            found.append(f"{self.kind} cannot run on the visual switch; use a divergence such as dbild or forward_kl")
        elif self.place.path == "switch" and type(self).extra is not RowTerm.extra:  # the switch would take it for its bridge
            found.append(f"{self.kind} carries a module of its own and cannot run on the visual switch; use forward_kl")
        if place.path == "switch" and place.positions in ("given", "generated"):
            found.append(f"positions: {place.positions} belongs to the student's own path; use response on the visual switch")
        if (self.reads_targets or not self.teacher_logits) and self.positions not in TARGETED:
            found.append(f"{self.kind} has no target at positions: {self.positions}; choose response, prompt or text")
        try:
            self.row_loss()
        except ValueError as error:
            found.append(str(error))
        return found

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        """`(student logits [r, V], teacher logits [r, V] or None, targets [r]) -> [r]`; see `mmkd.engine.rows.RowTerm`.

        signals: for a loss that reads state; None when only the options are checked.
        """
        raise TypeError(f"{type(self).__name__} has no row_loss")

    def top_k_loss(self) -> Callable[..., Any] | str:
        """The row loss against a teacher of which the k likeliest tokens are known, or why there is none."""
        return f"{self.kind} needs all of the teacher's logits"

    def row_weights(self, signals: Signals, rows: Rows) -> Tensor | None:
        """A factor of each row's value and gradient, [R]; None for 1."""
        return None

    def extras(self, signals: Signals, rows: Rows) -> tuple[Tensor, ...]:
        """Tensors [R, ...] that the loss takes too, row by row."""
        return ()

    def refusal(self, gives: Gives) -> str | None:
        lacking = super().refusal(gives)
        if lacking is None and gives.top_k is not None and self.teacher_logits and isinstance(why := self.top_k_loss(), str):
            return f"{why}, {gives.name} has {gives.mode}"
        return lacking

    def engine_term(self, rows: Rows, weight: float, signals: Signals) -> engine.RowTerm:
        """The term for the row engine; against a top-k teacher it reads what is kept, not the teacher's logits."""
        mask, factors = rows.mask(self.positions), self.row_weights(signals, rows)
        if self.teacher_logits and "hidden" not in rows.teacher:
            top = (rows.teacher["ids"].long(), rows.teacher["log_probs"], rows.teacher["tail"])
            extra = (*top, *self.extras(signals, rows))
            return engine.RowTerm(self.name, weight, self.top_k_loss(), False, mask, factors, extra)
        extra = self.extras(signals, rows)
        return engine.RowTerm(self.name, weight, self.row_loss(signals), self.teacher_logits, mask, factors, extra)

    def extra(self, pair: Pair) -> nn.Module | None:
        """For the visual switch with `bridge`: the map between encoders of different width."""
        if not self.place.bridge or pair.teacher is None:
            return None
        return Bridge(pair.student.feature_width, pair.teacher.feature_width)

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        return signals.zero if signals.extra is None else signals.extra(features, len(features)).sum() * 0.0


class Rows:
    """Hidden rows of both towers at the positions that some terms name, before any head."""

    def __init__(
        self, student: Tensor, student_head: engine.Head, teacher: dict[str, Tensor], targets: Tensor, masks: dict[str, Tensor],
        samples: Tensor,
    ):
        self.student = student  # [R, Ds]
        self.student_head = student_head
        self.teacher = teacher  # "hidden" [R, Dt], what a top-k cache keeps (`teachers.store.TOP_K`), or nothing
        self.targets = targets  # [R]
        self.samples = samples  # [R] which sample of the batch a row is of, on the CPU
        self._masks = masks  # by kind of position, each [R] bool, on the CPU; a row may be of two kinds

    def mask(self, positions: str) -> Tensor | None:
        """Rows of a kind of position; None when all rows are."""
        return None if len(self._masks) == 1 else self._masks[positions]


def terms_of_teacher(terms: Sequence[Term], name: str, teachers: Collection[str]) -> list[Term]:
    """The terms that compare with the teacher of this name, in each step; a term that names none has the only one."""
    return [term for term in terms if term.reads_teacher and name in teacher_names(term, teachers)]


def teacher_names(term: Term, teachers: Collection[str]) -> tuple[str, ...]:
    """The names of all teachers that a term compares with."""
    return term.several or (teacher_name(term, teachers),)


def teacher_name(term: Term, teachers: Collection[str]) -> str:
    """The name of the teacher that a term compares with, the first of several."""
    return term.place.teacher or next(iter(term.several), None) or next(iter(teachers), "teacher")
