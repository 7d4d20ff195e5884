"""Skewed KL divergences whose skew each row has of its own (DistiLLM-2, arXiv 2503.07067)."""

from dataclasses import dataclass

from torch import Tensor

from mmkd.losses.distributions import log_mixture, log_ratio, pair, scaled
from mmkd.losses.numerics import exact, result_dtype

NEAR = 1e-5  # added to a gap that is divided by


@dataclass(frozen=True)
class AdaptiveSkewKL:
    """Skew KL of each row, `Σ_v p_v log(p_v / m_v)` with `m = lam p + (1 - lam) q`, lam of the row's own.

    student, teacher: logits `[R, V]`; lam `[R]` in (0, 1); returns `[R]`. At lam 0 it would be `forward_kl`. The gradient goes
    through the mixture, as in `SkewKL`.
    Source: DistiLLM-2 (arXiv 2503.07067) and its released code, read: the term on the teacher's answers.
    """

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, lam: Tensor) -> Tensor:
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, 1.0)
        d = log_ratio(student, teacher)  # [R, V] log p/q
        terms = teacher.softmax(-1) * ((-d).relu() + log_mixture(d, _column(lam, d)))  # [R, V]
        return -terms.sum(-1).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared, lam) -> tuple[Tensor, Tensor]:
        q, p, d = pair(student, teacher, 1.0, shared)  # [R, V] each
        beta = _column(lam, d)  # [R, 1]
        small = log_mixture(d, beta)  # [R, V]
        values = -((-d).relu_().add_(small).mul_(p)).sum(-1)  # [R]
        weighted = small.add_(d.relu()).neg_().exp_().mul_(p).mul_(1 - beta)  # [R, V] p (1 - lam) q/m
        return values, (q * weighted.sum(-1, keepdim=True)).sub_(weighted)


@dataclass(frozen=True)
class AdaptiveSkewReverseKL:
    """Skew reverse KL of each row, `Σ_v q_v log(q_v / m_v)` with `m = (1 - lam) p + lam q` of no gradient, lam of the row's own.

    Shapes and source as in `AdaptiveSkewKL`: the term on the student's answers. Gradient `q (log(q/m) - Σ q log(q/m))`.
    """

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, lam: Tensor) -> Tensor:
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, 1.0)
        d = log_ratio(student, teacher).detach()  # [R, V]; what log q adds to the gradient sums to nothing
        return -(student.softmax(-1) * (d.relu() + log_mixture(d, 1 - _column(lam, d)))).sum(-1).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared, lam) -> tuple[Tensor, Tensor]:
        q, _, d = pair(student, teacher, 1.0, shared)  # [R, V] each
        log_share = log_mixture(d, 1 - _column(lam, d)).add_(d.relu()).neg_()  # [R, V] log q/m
        values = (q * log_share).sum(-1)  # [R]
        return values, log_share.sub_(values.unsqueeze(-1)).mul_(q)


def _column(lam: Tensor, like: Tensor) -> Tensor:
    return lam.to(like.dtype).unsqueeze(-1)


def adaptive_lam(gap: Tensor, anchor: float, lam: float, least: float) -> Tensor:
    """`1 - (1 - lam) anchor / (gap + 1e-5)`, between `least` and lam; gap `[N]`, float64.

    gap: how much more probable one model finds an answer than the other, by geometric means over its tokens; anchor: its mean at
    the beginning. Where the gap is as at the beginning lam is kept; the smaller it is, the nearer the loss comes to the plain KL.
    A gap that is not above 0 keeps lam. Source: DistiLLM-2, as released.
    """
    return (1 - (1 - lam) * anchor / (exact(gap) + NEAR)).clamp(least, lam)
