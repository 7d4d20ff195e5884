"""What losses on logits have in common that are no functions of one row alone, and so none of the row engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.errors import TowerError
from mmkd.losses.numerics import exact
from mmkd.teachers.teacher import Gives, check_vocabularies
from mmkd.terms.rows import mixed, row_keys
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Rows, Term


@dataclass(frozen=True)
class LogitTerm(Term):
    """A term that reads `signals["student.rows"]`, with the teacher's hidden rows in it, and makes what logits it wants."""

    needs: ClassVar[tuple[str, ...]] = ("student.rows", "teacher.rows")

    @property
    def count(self) -> str:  # type: ignore[override]
        return self.positions

    @property
    def teacher_positions(self) -> frozenset[str]:
        return frozenset({self.positions})

    def check(self, pair: Pair) -> list[str]:
        try:
            if pair.teacher is not None:
                check_vocabularies(pair.student, pair.teacher.body)
        except TowerError as error:
            return [str(error)]
        return []

    def refusal(self, gives: Gives) -> str | None:
        lacking = super().refusal(gives)
        if lacking is None and gives.top_k is not None:
            return f"{self.kind} needs all of the teacher's logits, {gives.name} has {gives.mode}"
        return lacking


def head_logits(head: Head, hidden: Tensor, vocabulary: int) -> Tensor:
    """Logits of hidden rows [r, D] over the first `vocabulary` columns, in the precision of the losses. [r, V]"""
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary]
        logits = exact(linear(hidden.to(weight.dtype), weight, bias)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def both_logits(signals: Signals, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the student's hidden rows [n, D] and the teacher's [n, Dt]; only the student's with gradient. [n, V] each"""
    with torch.no_grad():
        theirs = head_logits(signals.teacher.head, other, signals.vocabulary)
    return head_logits(signals.head, own, signals.vocabulary), theirs


def engine_sum(signals: Signals, rows: Rows, loss: Callable[..., Any], extra: tuple[Tensor, ...]) -> Tensor:
    """The sum of a row loss over the rows, by the row engine; extra: tensors [R, ...] that it takes too."""
    options = {"vocabulary": signals.vocabulary, "chunk_bytes": signals.chunk_bytes}
    theirs = {"teacher_hidden": rows.teacher["hidden"], "teacher_head": signals.teacher.head}
    term = RowTerm("loss", 1.0, loss, True, extra=extra)
    return row_losses(rows.student, rows.student_head, rows.targets, [term], **theirs, **options)[0]


@torch.no_grad()
def likeliest(signals: Signals, rows: Rows, k: int) -> Tensor:
    """Log-probabilities of the teacher's k likeliest tokens of each row, likeliest first. [R, k]"""

    def top(hidden: Tensor) -> Tensor:
        return head_logits(signals.teacher.head, hidden, signals.vocabulary).log_softmax(-1).topk(k, dim=-1).values.float()

    pieces = rows.teacher["hidden"].split(max(1, signals.chunk_bytes // (32 * signals.vocabulary)))
    return torch.cat([top(piece) for piece in pieces])


def sampled_over_ranks(signals: Signals, rows: Rows, limit: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """At most `limit` rows out of those of a micro-batch on all ranks: the same ones whichever rank has them.

    They are chosen by keys of sample, place and progress. Returns the student's hidden rows [n, D], with gradient that adds up
    over ranks, the teacher's [n, Dt], which of them are this rank's own [n] (on the CPU), and how many rows one stands for.
    With several ranks every one must call it, and waits for the device once.
    """
    keys = mixed(row_keys(signals.inputs.ids, rows.samples) ^ int(signals.progress * 2**40))  # [R]
    pick = keys.argsort()[:limit]  # [n]
    own, other = (x[pick.to(signals.device)] for x in (rows.student, rows.teacher["hidden"]))
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own, other, torch.ones(len(pick), dtype=torch.bool), len(keys) / max(1, len(pick))
    missing = limit - len(pick)
    own, other = (_AllGather.apply(pad(x, (0, 0, 0, missing))).flatten(0, 1) for x in (own, other))  # [ranks limit, D]
    sent = torch.cat([keys[pick], keys.new_full((missing,), _NONE), keys.new_tensor([len(keys)])])  # [limit + 1]
    found = _AllGather.apply(sent.to(signals.device)).cpu()  # [ranks, limit + 1]
    count = min(limit, int((found[:, :-1] != _NONE).sum()))
    order = found[:, :-1].flatten().argsort()[:count]  # [n]
    mine = order // limit == torch.distributed.get_rank()
    order = order.to(signals.device)
    return own[order], other[order], mine, int(found[:, -1].sum()) / max(1, count)


_NONE = 2**63 - 1  # the key of no row: it comes last


class _AllGather(torch.autograd.Function):
    """The same tensor of all ranks, [...] -> [ranks, ...]; on the way back, what all ranks want of one adds up."""

    @staticmethod
    def forward(ctx, tensor):
        found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(found, tensor.contiguous())
        return torch.stack(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[torch.distributed.get_rank()]
