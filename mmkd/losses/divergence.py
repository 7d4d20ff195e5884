"""Losses between two next-token distributions, one value a row, and the cross-entropy with the targets.

Shapes: `student` and `teacher` are logits `[R, V]` of the same rows and the same vocabulary, `targets` is
`[R]`. Every function returns `[R]` and never reduces over rows: sums and counts belong to the caller.

There are two forms of each loss. The functions (`forward_kl`, ...) are ordinary differentiable torch code.
The classes (`ForwardKL`, ...) are the same losses as callables of `(student, teacher, targets)` which can
also give their gradient in closed form (`value_and_grad`), without an autograd graph; the row engine uses
that when it is there.

Numerics. The functions compute in float64 and return float32 (float64 where the inputs are). The closed forms
compute in float32, where the log-ratio of two distributions is formed as `(teacher - student) - (lse_teacher -
lse_student)` with the two log-normalisers, one number a row, in float64: a rounding error there would be the same
for the whole row and would not average out over V. A row of nothing but -inf has no distribution and gives NaN;
any other -inf never does.

Convention for `beta`: 0 is the forward KL, KL(teacher || student); 1 the reverse KL, KL(student || teacher).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, exact_dtype, result_dtype

# Log-ratios of an impossible token are replaced by +-this: exp(-200) is 0 in float32, 1e-87 in float64.
_FAR = 200.0


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row, times temperature**2.

    `T² Σ_v p_v (log p_v - log q_v)` with `p = softmax(teacher / T)`, `q = softmax(student / T)`.
    student, teacher: `[R, V]`; returns `[R]`. Entries where either logit is -inf are dropped (as LLaVA-MoD's
    code does for the student's). The factor T² keeps the gradient's size independent of T (Hinton et al.,
    arXiv 1503.02531). Used at T = 1 by LLaVA-KD (arXiv 2410.16236, MDist) and LLaVA-MoD (arXiv 2408.15881,
    mimic distillation).
    """
    dtype = result_dtype(student, teacher)
    student, teacher = _scaled(student, teacher, temperature)
    terms = torch.softmax(teacher, -1) * _log_ratio(student, teacher)  # [R, V]
    return (_kept(terms, student, teacher).sum(-1) * temperature**2).to(dtype)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of each row, times temperature**2.

    `T² Σ_v q_v (log q_v - log p_v)`; shapes, dropped entries and T² as in `forward_kl`.
    Source: MiniLLM (arXiv 2306.08543) for the direction; token-wise as in GKD (arXiv 2306.13649).
    """
    dtype = result_dtype(student, teacher)
    student, teacher = _scaled(student, teacher, temperature)
    terms = -torch.softmax(student, -1) * _log_ratio(student, teacher)  # [R, V]
    return (_kept(terms, student, teacher).sum(-1) * temperature**2).to(dtype)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, times temperature**2.

    `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`, p the teacher, q the student
    (GKD, arXiv 2306.13649, eq. for D_JSD(beta)). **At the ends it is exactly the KL**: beta = 0 gives
    `forward_kl`, beta = 1 gives `reverse_kl`. The formula itself tends to 0 there (it is the *ratio* to beta,
    or 1 - beta, that tends to the KL), so the value jumps at the ends; this is GKD's convention and that of
    its implementations. student, teacher: `[R, V]`; returns `[R]`, finite also where logits are -inf. Raises
    ValueError for beta outside [0, 1].
    """
    _check_beta(beta)
    if beta == 0.0:
        return forward_kl(student, teacher, temperature)
    if beta == 1.0:
        return reverse_kl(student, teacher, temperature)
    dtype = result_dtype(student, teacher)
    student, teacher = _scaled(student, teacher, temperature)
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)  # [R, V] each
    d = _log_ratio(student, teacher)  # [R, V] log p/q
    small = _log_mixture(d, beta)  # [R, V]
    terms = (beta * p + (1 - beta) * q) * small + beta * p * (-d).relu() + (1 - beta) * q * d.relu()  # [R, V]
    return (-terms.sum(-1) * temperature**2).to(dtype)


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(student)[target] of each row.

    student `[R, V]`, targets `[R]` (ids below V; rows without a target are the caller's to leave out);
    returns `[R]`. A target whose logit is -inf costs +inf: that is the value, not an error of rounding.
    """
    log_q = torch.log_softmax(exact(student), -1)  # [R, V]
    return -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1).to(result_dtype(student))


# ---- the same as callables with a gradient in closed form ----


@dataclass(frozen=True)
class CrossEntropy:
    """`cross_entropy` as a row loss; gradient `q - onehot(target)`."""

    def __call__(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        return cross_entropy(student, targets)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, normaliser = _distribution(_wide(student), 1.0, "student", shared)  # [R, V], [R]
        column = targets.unsqueeze(-1)  # [R, 1]
        values = (normaliser - student.gather(-1, column).squeeze(-1).to(normaliser.dtype)).to(q.dtype)  # [R]
        grad = q.clone()  # [R, V]
        grad.scatter_add_(-1, column, torch.full_like(column, -1, dtype=q.dtype))
        return values, grad


@dataclass(frozen=True)
class ForwardKL:
    """`forward_kl` as a row loss; gradient `T (q - p)`."""

    temperature: float = 1.0

    def __post_init__(self):
        _check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return forward_kl(student, teacher, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, p, d = _pair(student, teacher, self.temperature, shared)  # [R, V] each
        kept = _dropped(p, student)  # [R, V]
        values = (kept * d).sum(-1) * self.temperature**2  # [R]
        grad = q * kept.sum(-1, keepdim=True)  # [R, V] the sum is 1 where nothing is dropped
        return values, grad.sub_(kept).mul_(self.temperature)


@dataclass(frozen=True)
class ReverseKL:
    """`reverse_kl` as a row loss; gradient `T q (log q/p - KL)`."""

    temperature: float = 1.0

    def __post_init__(self):
        _check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return reverse_kl(student, teacher, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, _, d = _pair(student, teacher, self.temperature, shared)  # [R, V] each
        kept = _dropped(q, teacher)  # [R, V]
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
        _check_beta(self.beta)
        _check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        return jsd(student, teacher, self.beta, self.temperature)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        if self.beta in (0.0, 1.0):
            end = ForwardKL(self.temperature) if self.beta == 0.0 else ReverseKL(self.temperature)
            return end.value_and_grad(student, teacher, targets, shared)
        beta, rest = self.beta, 1.0 - self.beta
        q, p, d = _pair(student, teacher, self.temperature, shared)  # [R, V] each
        small = _log_mixture(d, beta)  # [R, V]
        to_student = (d.relu()).add_(small).neg_()  # [R, V] log q/m
        to_teacher = small.add_((-d).relu_()).neg_()  # [R, V] log p/m
        weighted = q * to_student  # [R, V]
        total = weighted.sum(-1, keepdim=True)  # [R, 1]
        terms = to_teacher.mul_(p).mul_(beta).add_(weighted, alpha=rest)  # [R, V]
        values = terms.sum(-1) * self.temperature**2  # [R]
        return values, weighted.addcmul_(q, total, value=-1.0).mul_(rest * self.temperature)


# ---- parts ----


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1] (0 = forward KL, 1 = reverse KL)")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ; "
            "gather the same rows and cut both vocabularies to the same length"
        )
    student, teacher = exact(student), exact(teacher)
    if temperature == 1.0:
        return student, teacher
    return student / temperature, teacher / temperature


def _log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """log p/q `[R, V]`, with 0 where both logits are -inf and +-_FAR where one of them is."""
    shift = teacher.logsumexp(-1, keepdim=True) - student.logsumexp(-1, keepdim=True)  # [R, 1]
    gone_s, gone_t = student == -math.inf, teacher == -math.inf  # [R, V]
    d = teacher.masked_fill(gone_t, 0.0) - student.masked_fill(gone_s, 0.0) - shift  # [R, V]
    d = d.masked_fill(gone_s, _FAR).masked_fill(gone_t, -_FAR)
    return d.masked_fill(gone_s & gone_t, 0.0)


def _kept(terms: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return terms.masked_fill((student == -math.inf) | (teacher == -math.inf), 0.0)


def _dropped(weights: Tensor, logits: Tensor) -> Tensor:
    """The weights `[R, V]`, 0 where the logits are -inf."""
    # Comparing into floats is several times as fast on a CPU as multiplying by bools.
    return torch.ne(logits, -math.inf, out=torch.empty_like(weights)).mul_(weights)


def _log_mixture(d: Tensor, beta: float) -> Tensor:
    """log of `(1 - beta) + beta e^d` less `max(d, 0)`, without overflow and exact for small d.

    With L this number: log m/q = max(d, 0) + L and log m/p = max(-d, 0) + L.
    """
    # The weight of the smaller of p and q in m: beta where p is the smaller (d < 0), 1 - beta where q is.
    weight = (d > 0).to(d.dtype).mul_(1 - 2 * beta).add_(beta)  # [R, V]
    return (weight * torch.expm1(-d.abs())).log1p()


def _distribution(logits: Tensor, temperature: float, who: str, shared: dict | None) -> tuple[Tensor, Tensor]:
    """softmax(logits / T) `[R, V]` and its log-normaliser `[R]` (float64); taken from `shared` if a term made
    it before.

    What lies in `shared` is read by other terms: never change it in place.
    """
    key = (who, temperature)
    if shared is not None and key in shared:
        return shared[key]
    q = torch.softmax(logits if temperature == 1.0 else logits / temperature, -1)  # [R, V]
    # The largest probability is exp(0) / Σ, so its log gives Σ without another pass of exp.
    wide = exact_dtype(logits)
    normaliser = logits.amax(-1).to(wide) / temperature - q.amax(-1).to(wide).log()  # [R]
    if shared is not None:
        shared[key] = (q, normaliser)
    return q, normaliser


def _pair(
    student: Tensor, teacher: Tensor, temperature: float, shared: dict | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and log p/q, all `[R, V]`; the last finite as in `_log_ratio`, and like the others not to be
    changed."""
    student, teacher = _wide(student), _wide(teacher)
    q, normaliser_s = _distribution(student, temperature, "student", shared)
    p, normaliser_t = _distribution(teacher, temperature, "teacher", shared)
    key = ("ratio", temperature)
    if shared is not None and key in shared:
        return q, p, shared[key]
    d = teacher - student  # [R, V]
    if temperature != 1.0:
        d.div_(temperature)
    # The normalisers come after: a NaN among the logits makes them NaN, and so is not hidden by this
    # replacement.
    d.nan_to_num_(0.0, _FAR, -_FAR)
    d.sub_((normaliser_t - normaliser_s).to(d.dtype).unsqueeze(-1))
    if shared is not None:
        shared[key] = d
    return q, p, d
