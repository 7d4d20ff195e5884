"""Losses between two next-token distributions, one value a row, and the cross-entropy with the targets.

Shapes: `student` and `teacher` are logits `[R, V]` of the same rows and the same vocabulary, `targets` is
`[R]`. Every function returns `[R]` and never reduces over rows: sums and counts belong to the caller.

There are two forms of each loss. The functions (`forward_kl`, ...) are ordinary differentiable torch code.
The classes (`ForwardKL`, ...) are the same losses as callables of `(student, teacher, targets)` which can
also give their gradient in closed form (`value_and_grad`), without an autograd graph; the row engine uses
that when it is there.

Numerics. The functions compute in float64 and return float32 (float64 where the inputs are); the closed forms are in float32, see
`distributions.py`.

Convention for `beta`: 0 is the forward KL, KL(teacher || student); 1 the reverse KL, KL(student || teacher).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import (
    check_temperature,
    distribution,
    dropped,
    kept_terms,
    log_mixture,
    log_ratio,
    pair,
    scaled,
    wide,
)
from mmkd.losses.numerics import exact, result_dtype


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row, times temperature**2.

    `T² Σ_v p_v (log p_v - log q_v)` with `p = softmax(teacher / T)`, `q = softmax(student / T)`.
    student, teacher: `[R, V]`; returns `[R]`. Entries where either logit is -inf are dropped (as LLaVA-MoD's
    code does for the student's). The factor T² keeps the gradient's size independent of T (Hinton et al.,
    arXiv 1503.02531). Used at T = 1 by LLaVA-KD (arXiv 2410.16236, MDist) and LLaVA-MoD (arXiv 2408.15881,
    mimic distillation).
    """
    dtype = result_dtype(student, teacher)
    student, teacher = scaled(student, teacher, temperature)
    terms = torch.softmax(teacher, -1) * log_ratio(student, teacher)  # [R, V]
    return (kept_terms(terms, student, teacher).sum(-1) * temperature**2).to(dtype)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of each row, times temperature**2.

    `T² Σ_v q_v (log q_v - log p_v)`; shapes, dropped entries and T² as in `forward_kl`.
    Source: MiniLLM (arXiv 2306.08543) for the direction; token-wise as in GKD (arXiv 2306.13649).
    """
    dtype = result_dtype(student, teacher)
    student, teacher = scaled(student, teacher, temperature)
    terms = -torch.softmax(student, -1) * log_ratio(student, teacher)  # [R, V]
    return (kept_terms(terms, student, teacher).sum(-1) * temperature**2).to(dtype)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, times temperature**2.

    `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`, p the teacher, q the student
    (GKD, arXiv 2306.13649, eq. for D_JSD(beta)). **At the ends it is exactly the KL**: beta = 0 gives
    `forward_kl`, beta = 1 gives `reverse_kl`. The formula itself tends to 0 there (it is the *ratio* to beta,
    or 1 - beta, that tends to the KL), so the value jumps at the ends; this is GKD's convention and that of
    its implementations. student, teacher: `[R, V]`; returns `[R]`, finite also where logits are -inf. Raises
    ValueError for beta outside [0, 1].
    """
    check_beta(beta)
    if beta == 0.0:
        return forward_kl(student, teacher, temperature)
    if beta == 1.0:
        return reverse_kl(student, teacher, temperature)
    dtype = result_dtype(student, teacher)
    student, teacher = scaled(student, teacher, temperature)
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)  # [R, V] each
    d = log_ratio(student, teacher)  # [R, V] log p/q
    small = log_mixture(d, beta)  # [R, V]
    terms = (beta * p + (1 - beta) * q) * small + beta * p * (-d).relu() + (1 - beta) * q * d.relu()  # [R, V]
    return (-terms.sum(-1) * temperature**2).to(dtype)


def cross_entropy(student: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(student)[target] of each row; with label smoothing e, (1 - e) times that and e times its mean over all tokens
    whose logit is not -inf (Szegedy et al. 2016, "Rethinking the Inception architecture").

    student `[R, V]`, targets `[R]` (ids below V; rows without a target are the caller's to leave out);
    returns `[R]`. A target whose logit is -inf costs +inf: that is the value, not an error of rounding.
    """
    log_q = torch.log_softmax(exact(student), -1)  # [R, V]
    values = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [R]
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * (log_q * _even(student, log_q.dtype)).nan_to_num(0.0).sum(-1)
    return values.to(result_dtype(student))


def _even(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal weights that add up to 1 for what is not -inf. [R, V]"""
    there = (logits != -math.inf).to(dtype)
    return there / there.sum(-1, keepdim=True)


# ---- the same as callables with a gradient in closed form ----


@dataclass(frozen=True)
class CrossEntropy:
    """`cross_entropy` as a row loss; gradient `q - onehot(target)`, smoothed `q - (1 - e) onehot(target) - e / V`."""

    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")

    def __call__(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        return cross_entropy(student, targets, self.label_smoothing)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, normaliser = distribution(wide(student), 1.0, "student", shared)  # [R, V], [R]
        column = targets.unsqueeze(-1)  # [R, 1]
        values = (normaliser - student.gather(-1, column).squeeze(-1).to(normaliser.dtype)).to(q.dtype)  # [R]
        grad = q.clone()  # [R, V]
        if self.label_smoothing:
            even = _even(student, q.dtype)  # [R, V]
            mean = (student.masked_fill(student == -math.inf, 0.0).to(q.dtype) * even).sum(-1)  # [R]
            values = (1 - self.label_smoothing) * values + self.label_smoothing * (normaliser - mean).to(q.dtype)
            grad.sub_(even, alpha=self.label_smoothing)
        grad.scatter_add_(-1, column, torch.full_like(column, -1, dtype=q.dtype) * (1 - self.label_smoothing))
        return values, grad


@dataclass(frozen=True)
class ForwardKL:
    """`forward_kl` as a row loss; gradient `T (q - p)`."""

    temperature: float = 1.0

    def __post_init__(self):
        check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return forward_kl(student, teacher, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, p, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        kept = dropped(p, student)  # [R, V]
        values = (kept * d).sum(-1) * self.temperature**2  # [R]
        grad = q * kept.sum(-1, keepdim=True)  # [R, V] the sum is 1 where nothing is dropped
        return values, grad.sub_(kept).mul_(self.temperature)


@dataclass(frozen=True)
class ReverseKL:
    """`reverse_kl` as a row loss; gradient `T q (log q/p - KL)`."""

    temperature: float = 1.0

    def __post_init__(self):
        check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return reverse_kl(student, teacher, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, _, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        kept = dropped(q, teacher)  # [R, V]
        values = -(kept * d).sum(-1) * self.temperature**2  # [R]
        # d/dz_j of Σ_kept q u, u = log q/p, is q_j ((u_j + 1)[j kept] - Σ_kept q (u + 1)). Without drops the
        # 1s cancel.
        grad = torch.addcmul(kept, kept, d, value=-1.0)  # [R, V] kept (u + 1)
        grad.addcmul_(q, grad.sum(-1, keepdim=True), value=-1.0)
        return values, grad.mul_(self.temperature)


@dataclass(frozen=True)
class JSD:
    """`jsd` as a row loss; gradient `(1 - beta) T q (u - Σ q u)` with `u = log q/m`."""

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        check_beta(self.beta)
        check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return jsd(student, teacher, self.beta, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        if self.beta in (0.0, 1.0):
            end = ForwardKL(self.temperature) if self.beta == 0.0 else ReverseKL(self.temperature)
            return end.value_and_grad(student, teacher, targets, shared)
        beta, rest = self.beta, 1.0 - self.beta
        q, p, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        small = log_mixture(d, beta)  # [R, V]
        to_student = (d.relu()).add_(small).neg_()  # [R, V] log q/m
        to_teacher = small.add_((-d).relu_()).neg_()  # [R, V] log p/m
        weighted = q * to_student  # [R, V]
        total = weighted.sum(-1, keepdim=True)  # [R, 1]
        terms = to_teacher.mul_(p).mul_(beta).add_(weighted, alpha=rest)  # [R, V]
        values = terms.sum(-1) * self.temperature**2  # [R]
        return values, weighted.addcmul_(q, total, value=-1.0).mul_(rest * self.temperature)


def check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1] (0 = forward KL, 1 = reverse KL)")
