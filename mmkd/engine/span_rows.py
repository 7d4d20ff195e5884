"""Losses of spans of text whose tokens two models cut differently, from hidden rows before either head.

As the row engine does for rows: logits are made for a few spans at a time, and value and gradient come from one walk through
them, so that memory is flat in the number of rows and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.engine.products import HeadProduct
from mmkd.engine.rows import Head
from mmkd.losses.spans import SpanRows, Spans

# Numbers of 4 bytes that a span's row takes at once, for each entry of a vocabulary.
_OWN, _OTHER, _MATCHED, _UNMATCHED = 3, 2, 7, 8


@dataclass(frozen=True)
class Side:
    """One model: its head, the columns of it that are its vocabulary, its targets [R], and each span's rows [G, 2]."""

    head: Head
    vocabulary: int
    targets: Tensor
    borders: Tensor


def span_sum(
    hidden: tuple[Tensor, Tensor], sides: tuple[Side, Side], loss: Spans, matched: Tensor, weights: Tensor, chunk_bytes: int
) -> Tensor:
    """The losses of all spans, each times its weight [G], summed; the gradient goes to the student's rows and head.

    hidden: rows [Rs, Ds] and [Rt, Dt] of student and teacher that predict their targets.  matched [2, M]: ids of strings that
    are in both vocabularies.  chunk_bytes: what is made of logits at once.
    """
    if not len(weights):
        return hidden[0].sum() * 0.0
    head = sides[0].head
    unmatched = tuple(_others(side.vocabulary, ids) for side, ids in zip(sides, matched.cpu(), strict=True))
    walk = _Walk(sides, loss, matched, unmatched, weights, chunk_bytes)
    return _SpanSum.apply(walk, hidden[0], hidden[1].detach(), head.weight, head.bias)


def _others(vocabulary: int, ids: Tensor) -> Tensor:
    keep = torch.ones(vocabulary, dtype=torch.bool)
    keep[ids] = False
    return keep.nonzero().squeeze(1)


@dataclass
class _Walk:
    sides: tuple[Side, Side]
    loss: Spans
    matched: Tensor
    unmatched: Sequence[Tensor]
    weights: Tensor
    chunk_bytes: int

    def to(self, device: torch.device) -> None:
        self.matched, self.weights = self.matched.to(device), self.weights.to(device)
        self.unmatched = tuple(ids.to(device) for ids in self.unmatched)

    def chunks(self) -> list[slice]:
        """Consecutive spans whose rows fit the budget; at least one."""
        sizes = torch.stack([side.borders[:, 1] - side.borders[:, 0] for side in self.sides]).amax(0).tolist()
        own, other = (side.vocabulary for side in self.sides)
        row = 4 * (_OWN * own + _OTHER * other + _MATCHED * self.matched.shape[1] + _UNMATCHED * max(map(len, self.unmatched)))
        budget, found, start, used = max(1, self.chunk_bytes // row), [], 0, 0
        for index, size in enumerate(sizes):
            if used + size > budget and index > start:
                found.append(slice(start, index))
                start, used = index, 0
            used += size
        return [*found, slice(start, len(sizes))]


class _SpanSum(torch.autograd.Function):
    """The sum, with its gradient made on the way; backward scales it."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, own: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(own.device.type, enabled=False):
            total, gradients = _walked(walk, own, other, (own, weight, bias), [ctx.needs_input_grad[n] for n in (1, 3, 4)])
        ctx.gradients, ctx.dtypes, ctx.spent = gradients, [None if t is None else t.dtype for t in (own, weight, bias)], False
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("second backward through span_sum; call it again, or add the losses up for one backward")
        ctx.spent = True  # a gradient of the head is too large for a second copy: it is scaled in place and given away
        gradients, ctx.gradients = ctx.gradients, None
        own, weight, bias = (None if g is None else g.mul_(upstream).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))
        return None, own, None, weight, bias


def _walked(
    walk: _Walk, own: Tensor, other: Tensor, given: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum, and its gradient by what is given."""
    walk.to(own.device)
    student, teacher = (_Rows(side, rows, walk.chunk_bytes) for side, rows in zip(walk.sides, (own, other), strict=True))
    student.store(given, wanted)
    total = torch.zeros((), device=own.device)
    for piece in walk.chunks():
        their = teacher.probabilities(piece)
        mine = student.probabilities(piece)
        values, by_probability, by_following = walk.loss.value_and_grad(mine, their, walk.matched, walk.unmatched)
        factor = walk.weights[piece].to(values.dtype)
        total += (values * factor).sum()
        if any(wanted):
            student.back(by_probability.mul_(factor[:, None]), by_following * factor)
    return total, student.gradients


class _Rows:
    """The rows of one model, walked through span by span."""

    def __init__(self, side: Side, hidden: Tensor, chunk_bytes: int):
        self.side = side
        weight = side.head.weight[: side.vocabulary].detach()
        self.product = HeadProduct(weight, chunk_bytes // 8)
        self.bias = None if side.head.bias is None else side.head.bias[: side.vocabulary].detach()
        self.hidden = hidden.detach()
        self.gradients: list[Tensor | None] = [None, None, None]

    def store(self, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        """Where the gradients go: of the rows, the head's weight and its bias."""
        dtype = self.product.dtype
        self.gradients = [torch.zeros_like(t, dtype=dtype) if want else None for t, want in zip(given, wanted, strict=True)]

    def probabilities(self, piece: slice) -> SpanRows:
        """What the model says of some spans; keeps what `back` needs."""
        borders = self.side.borders[piece]
        self.start, end = int(borders[0, 0]), int(borders[-1, 1])
        device = self.hidden.device
        self.x = self.product.rows(self.hidden[self.start : end])
        size = (len(self.x), self.side.vocabulary)
        logits = self.product.logits(self.x, torch.empty(size, dtype=self.product.dtype, device=device))  # [r, V]
        if self.bias is not None:
            logits += self.bias
        head = self.side.head
        self.slope = None
        if head.softcap is not None:
            logits.mul_(head.scale / head.softcap).tanh_()
            self.slope = (1 - logits.square()).mul_(head.scale)
            logits.mul_(head.softcap)
        elif head.scale != 1.0:
            logits.mul_(head.scale)
        self.targets = self.side.targets[self.start : end, None]
        normaliser = logits.logsumexp(-1, keepdim=True)  # [r, 1]
        chosen = (logits.gather(1, self.targets) - normaliser).squeeze(1)  # [r]
        self.all = logits.sub_(normaliser).exp_()  # [r, V]
        self.first = (borders[:, 0] - self.start).to(device)
        self.last = (borders[:, 1] - self.start).to(device)
        up_to = torch.cat([chosen.new_zeros(1), chosen.cumsum(0)])  # [r + 1]
        following = up_to[self.last] - up_to[self.first + 1]
        self.simple = len(self.first) == len(self.all)  # every row begins a span
        own = self.all if self.simple else self.all[self.first]
        self.said = SpanRows(own, self.targets[self.first].squeeze(1), following)
        return self.said

    def back(self, by_probability: Tensor, by_following: Tensor) -> None:
        """From gradients by the probabilities [G, V] and by `following` [G] to those of rows and head."""
        p = self.said.probabilities
        of_first = by_probability.sub_((p * by_probability).sum(-1, keepdim=True)).mul_(p)  # [G, V]
        if self.simple:
            gradient = of_first
        else:
            rows = torch.arange(len(self.all), device=p.device)
            span = torch.searchsorted(self.first, rows, right=True) - 1  # of each row
            within = (span >= 0) & (rows < self.last[span.clamp(min=0)]) & (rows > self.first[span.clamp(min=0)])
            share = torch.where(within, by_following[span.clamp(min=0)], 0.0)[:, None]  # [r, 1]
            gradient = self.all.mul_(-share)
            gradient.scatter_add_(1, self.targets, share)
            gradient.index_copy_(0, self.first, of_first)
        if self.slope is not None:
            gradient.mul_(self.slope)
        elif self.side.head.scale != 1.0:
            gradient.mul_(self.side.head.scale)
        self._add(gradient)

    def _add(self, gradient: Tensor) -> None:
        of_rows, of_weight, of_bias = self.gradients
        if of_bias is not None:
            of_bias[: gradient.shape[1]] += gradient.sum(0)
        lifted = gradient.mul_(self.product.gain).to(self.product.gradient_dtype)
        if of_rows is not None:
            of_rows[self.start : self.start + len(gradient)] += self.product.to_hidden(lifted)
        if of_weight is not None:
            self.product.add_to_weight(lifted, self.x, of_weight[: gradient.shape[1]], first=False)
