"""Terms of the training loss: what each one needs, on which positions it counts, and how it is weighted.

A row term is a pure function of `mmkd.losses` on logit rows. The distiller takes the union of what the terms need, runs
each pass once, and hands all row terms to the row engine together. A new method is a function and an entry here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmkd import losses
from mmkd.losses.features import DISTANCES
from mmkd.losses.preference import FORMS
from mmkd.losses.relation import SOURCES


@dataclass(frozen=True)
class TermKind:
    """What a kind of term is: its function, and what it cannot do without."""

    function: Callable[..., Any]  # a row-loss class for the row engine, else a function of one image's tensors
    teacher: bool = True  # compares with the teacher
    rows: bool = True  # a function of logit rows, computed by the row engine
    preference: bool = False  # a function of the log-probabilities of a chosen and a rejected answer, [B] each
    given: tuple[str, ...] = ()  # keyword arguments that the distiller gives, no options
    choices: dict[str, Sequence[str]] = field(default_factory=dict)  # options that are words: which

    @property
    def options(self) -> tuple[str, ...]:
        """Keyword arguments that a recipe may set."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.default is not inspect.Parameter.empty and p.name not in self.given)


KINDS: dict[str, TermKind] = {
    "cross_entropy": TermKind(losses.CrossEntropy, teacher=False),
    "forward_kl": TermKind(losses.ForwardKL),
    "reverse_kl": TermKind(losses.ReverseKL),
    "jsd": TermKind(losses.JSD),
    "dbild": TermKind(losses.DBiLD),
    "relation": TermKind(losses.relation_from_hidden, rows=False, choices={"source": SOURCES}),
    "feature_match": TermKind(losses.feature_match, rows=False, choices={"distance": DISTANCES}),
    "spans": TermKind(losses.spans, rows=False),
    "contrastive": TermKind(losses.contrastive, teacher=False, rows=False),
    "tags": TermKind(losses.tags, teacher=False, rows=False),
    "dpo": TermKind(losses.dpo, rows=False, preference=True, choices={"form": FORMS}),
    "kto_pair": TermKind(losses.kto_pair, rows=False, preference=True, given=("kl",)),
    "load_balance": TermKind(losses.balance_of_layers, teacher=False, rows=False),
}

# Rows that predict the response or the prompt's text; rows of visual tokens; rows that hold the response's tokens (the mask
# without its shift, as LLaVA-MoD's code has it); response and prompt; everything but padding.
POSITIONS = ("response", "prompt", "visual", "answer", "text", "all")
PATHS = ("student", "switch")
REDUCTIONS = ("mean", "sum")


def rows_at(inputs: Any, positions: str) -> Tensor:
    """The rows of a batch (TowerInputs) that a term's `positions` names. [B, L] bool"""
    if positions == "text":
        return inputs.response | inputs.prompt
    if positions == "all":
        return inputs.attention_mask.bool()
    return getattr(inputs, positions)


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
class Term:
    """One term of one stage.

    name: what it is called in logs and on the command line.  kind: an entry of KINDS.
    positions: the positions whose rows count.  path: whose rows they are, the student's or those of the visual switch.
    bridge: for the switch, whether a trained linear map may stand between encoders of different width.
    reduction: of a row term, "mean" over its rows, or their "sum" in each sample and the mean over samples.
    """

    name: str
    kind: str
    weight: Schedule
    positions: str = "response"
    path: str = "student"
    bridge: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    reduction: str = "mean"

    @property
    def needs_teacher(self) -> bool:
        return KINDS[self.kind].teacher

    @property
    def is_row_term(self) -> bool:
        return KINDS[self.kind].rows

    @property
    def is_preference(self) -> bool:
        """Whether it compares a chosen with a rejected answer; its teacher is a cached reference, not a live one."""
        return KINDS[self.kind].preference

    @property
    def count(self) -> str:
        """Which global count divides the term's sum."""
        if self.is_preference:
            return "pair"
        if self.kind == "load_balance":
            return "token"
        if self.kind == "spans":
            return "response"
        if not self.is_row_term:
            return "pictured" if self.kind in ("contrastive", "tags") else "image"
        if self.reduction == "sum":
            return "pictured" if self.path == "switch" else "sample"
        if self.path == "switch":
            return "switch" if self.positions == "response" else f"switch_{self.positions}"
        return self.positions

    def row_loss(self) -> Callable[..., Any]:
        """(student logits [r, V], teacher logits [r, V] or None, targets [r]) -> [r]"""
        return KINDS[self.kind].function(**dict(self.options))
