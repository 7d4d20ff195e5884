"""How much a teacher weighs against the label at each token, learned from the triangle of these and the student (TGeo-KD)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd import losses
from mmkd.engine.rows import RowTerm, row_losses
from mmkd.losses.numerics import exact
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm, head_logits
from mmkd.terms.signals import Signals
from mmkd.terms.term import TARGETED, Pair, Rows

WIDTH = 32  # of the network that gives the ratio


@register("terms", "tgeo_kd")
@dataclass(frozen=True)
class TrilateralRatio(LogitTerm):
    """a KL(teacher || student) + (1 - a) cross-entropy, with a ratio a of each token that is learned for the other samples' sake.

    A small network reads the sides of the triangle of student, teacher and label, and gives a. It learns so that a step of the
    student on one half of the micro-batch's samples lowers the labels' cross-entropy of the other half (two levels).
    """

    origin: ClassVar[str] = "TGeo-KD (arXiv 2312.15112)"
    status: ClassVar[str] = (
        "confirmed: the loss, a in (0, 1), two levels with the ratio held in the inner step; our choice: what the network reads "
        "(sides, their means over rows of the same label, losses), a ratio a token, the other half of the micro-batch for "
        "validation data, a look-ahead of first order through the head's weights alone"
    )

    look_ahead: float = 1.0  # the inner step, in units of the hidden rows' mean squared length; 0: the ratio stays at a half

    @property
    def learns_answers(self) -> bool:
        return True

    def errors(self) -> list[str]:
        found = ["look_ahead must not be negative"] if self.look_ahead < 0 else []
        if self.positions not in TARGETED:
            found.append(f"tgeo_kd has no label at positions: {self.positions}; choose response, prompt or text")
        return found

    def extra(self, pair: Pair) -> nn.Module:
        network = nn.Sequential(nn.Linear(9, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(network[-1].weight)  # a half everywhere at first
        nn.init.zeros_(network[-1].bias)
        return network

    def loss(self, signals: Signals) -> Tensor:
        rows = signals["student.rows"]
        if not len(rows.targets):
            signals.observe(f"{self.name}.ratio", signals.zero, signals.zero)
            return rows.student.sum() * 0.0 + self.dummy(signals, rows.student)
        ratio = self.ratio(signals, rows)  # [R]
        signals.observe(f"{self.name}.ratio", ratio.detach().sum(), signals.counts[self.count])
        parts = [
            RowTerm("teacher", 1.0, losses.ForwardKL(), True, row_weights=ratio.detach()),
            RowTerm("label", 1.0, losses.CrossEntropy(), False, row_weights=1 - ratio.detach()),
        ]
        theirs = {"teacher_hidden": rows.teacher["hidden"], "teacher_head": signals.teacher.head}
        options = {"vocabulary": signals.vocabulary, "chunk_bytes": signals.chunk_bytes}
        total = row_losses(rows.student, rows.student_head, rows.targets, parts, **theirs, **options)[0]
        if not self.look_ahead:
            return total + self.dummy(signals, rows.student)
        toll = (self.look_ahead * self.tolls(signals, rows) * ratio).sum()
        return total + toll - toll.detach()

    def ratio(self, signals: Signals, rows: Rows) -> Tensor:
        """The teacher's share of each row's loss, with gradient to the network alone. [R]"""
        with torch.no_grad():
            found = torch.cat([triangle(q, p, y) for q, p, y in _pieces(signals, rows)])  # [R, 6]
            read = torch.cat([found, class_means(found[:, :3], rows.targets.to(found.device))], -1)
        weight = signals.extra[0].weight
        return exact(signals.extra(read.log1p().to(weight.dtype))).sigmoid()[:, 0]

    @torch.no_grad()
    def tolls(self, signals: Signals, rows: Rows) -> Tensor:
        """By how much a larger ratio at each row raises the loss on the other half's labels, after a step of length 1. [R]"""
        place = torch.unique(rows.samples, return_inverse=True)[1].to(signals.device)
        hidden = exact(rows.student.detach())
        hidden = hidden / hidden.square().sum(-1).mean().sqrt().clamp(min=1e-12)
        found = hidden.new_zeros(len(hidden))
        start = 0
        for q, _, judged in _pieces(signals, rows):
            judge, first = slice(start, start + len(q)), 0
            for _, p, targets in _pieces(signals, rows):
                own = slice(first, first + len(p))
                other = (place[own, None] - place[None, judge]).remainder(2)  # 1 where the samples are of different halves
                number = (place[None] - place[own, None]).remainder(2).sum(-1).clamp(min=1)
                near = hidden[own] @ hidden[judge].T * other / number[:, None]
                found[own] -= (near * agreement(p, targets, q, judged)).sum(-1)
                first += len(p)
            start += len(q)
        return found


def _pieces(signals: Signals, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Distributions of student and teacher [r, V], and labels [r], a chunk of rows at a time."""
    size = max(1, signals.chunk_bytes // (64 * signals.vocabulary))
    targets = rows.targets.to(signals.device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        own = head_logits(rows.student_head, rows.student[part].detach(), signals.vocabulary)
        theirs = head_logits(signals.teacher.head, rows.teacher["hidden"][part], signals.vocabulary)
        yield own.softmax(-1), theirs.softmax(-1), targets[part]


def triangle(q: Tensor, p: Tensor, targets: Tensor) -> Tensor:
    """Sides |p - q|, |p - y|, |q - y| of each row, cross-entropies of q and p, and KL(p || q). [r, V], [r, V], [r] -> [r, 6]"""
    column = targets[:, None]
    label = torch.zeros_like(q).scatter_(-1, column, 1.0)
    sides = [(one - other).norm(dim=-1) for one, other in ((p, q), (p, label), (q, label))]
    least = torch.finfo(torch.float32).tiny
    costs = [-one.gather(-1, column)[:, 0].clamp(min=least).log() for one in (q, p)]
    kl = (torch.xlogy(p, p) - p * q.clamp(min=least).log()).sum(-1).clamp(min=0)
    return torch.stack([*sides, *costs, kl], -1)


def class_means(values: Tensor, targets: Tensor) -> Tensor:
    """Of each row the mean over the rows with its label. [R, n], [R] -> [R, n]"""
    _, of, number = torch.unique(targets, return_inverse=True, return_counts=True)
    return (values.new_zeros(len(number), values.shape[1]).index_add_(0, of, values) / number[:, None])[of]


def agreement(p: Tensor, targets: Tensor, q: Tensor, judged: Tensor) -> Tensor:
    """Products of y - p of some rows with q - y of others: how a step towards the teacher instead of the label moves the logits,
    and what that costs at other rows. [n, V], [n], [m, V], [m] -> [n, m]"""
    same = (targets[:, None] == judged[None]).to(p.dtype)
    return q[:, targets].T - same - p @ q.T + p[:, judged]
