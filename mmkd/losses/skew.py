"""Skewed KL divergences: against a mixture of both distributions, so that they stay bounded (DistiLLM, arXiv 2402.03898)."""

from dataclasses import dataclass

from torch import Tensor

from mmkd.losses.distributions import check_temperature, log_mixture, log_ratio, pair, scaled
from mmkd.losses.divergence import ForwardKL, ReverseKL
from mmkd.losses.numerics import result_dtype


@dataclass(frozen=True)
class SkewKL:
    """Skew KL of each row: `T² Σ_v p_v log(p_v / m_v)` with `m = lam p + (1 - lam) q`.

    p = softmax(teacher / T), q = softmax(student / T); student, teacher `[R, V]`, returns `[R]`. At lam = 0 it is `forward_kl`;
    above, it is at most `-T² log lam`, also where q is 0. Gradient `T (q Σ w - w)` with `w = p (1 - lam) q / m`.

    Source: DistiLLM (arXiv 2402.03898, skew KL), lam 0.1 as in the released code. No gradient is stopped inside the mixture
    (released code). T is our addition (theirs is 1); it multiplies as in `forward_kl`.
    Raises ValueError for lam outside [0, 1) (at 1 the loss is 0 whatever the student does) and for T not above 0.
    """

    lam: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        _check(self.lam, self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.lam == 0.0:
            return ForwardKL(self.temperature)(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, self.temperature)
        d = log_ratio(student, teacher)  # [R, V] log p/q
        terms = teacher.softmax(-1) * ((-d).relu() + log_mixture(d, self.lam))  # [R, V]
        return (-terms.sum(-1) * self.temperature**2).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        if self.lam == 0.0:
            return ForwardKL(self.temperature).value_and_grad(student, teacher, targets, shared)
        q, p, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        small = log_mixture(d, self.lam)  # [R, V]
        values = -((-d).relu_().add_(small).mul_(p)).sum(-1) * self.temperature**2  # [R]
        weighted = small.add_(d.relu()).neg_().exp_().mul_(p).mul_(1 - self.lam)  # [R, V] p (1 - lam) q/m
        grad = q * weighted.sum(-1, keepdim=True)  # [R, V]
        return values, grad.sub_(weighted).mul_(self.temperature)


@dataclass(frozen=True)
class SkewReverseKL:
    """Skew reverse KL of each row: `T² Σ_v q_v log(q_v / m_v)` with `m = (1 - lam) p + lam q`.

    Shapes, T, bound, source and errors as in `SkewKL`; at lam = 0 it is `reverse_kl`. Gradient `T q (u - Σ q u)` with
    `u = log(q/m) - lam q/m`. DistiLLM's first version lets the gradient through the mixture, as here; DistiLLM-2 detaches it.
    """

    lam: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        _check(self.lam, self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.lam == 0.0:
            return ReverseKL(self.temperature)(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, self.temperature)
        d = log_ratio(student, teacher)  # [R, V] log p/q
        terms = student.softmax(-1) * (d.relu() + log_mixture(d, 1 - self.lam))  # [R, V]
        return (-terms.sum(-1) * self.temperature**2).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        if self.lam == 0.0:
            return ReverseKL(self.temperature).value_and_grad(student, teacher, targets, shared)
        q, _, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        log_share = log_mixture(d, 1 - self.lam).add_(d.relu()).neg_()  # [R, V] log q/m
        values = (q * log_share).sum(-1) * self.temperature**2  # [R]
        weighted = log_share.sub_(log_share.exp(), alpha=self.lam).mul_(q)  # [R, V]
        weighted.addcmul_(q, weighted.sum(-1, keepdim=True), value=-1.0)
        return values, weighted.mul_(self.temperature)


def _check(lam: float, temperature: float) -> None:
    if not 0.0 <= lam < 1.0:
        raise ValueError(f"lam is {lam}; it must lie in [0, 1): 0 is the plain KL, and at 1 the loss is always 0")
    check_temperature(temperature)
