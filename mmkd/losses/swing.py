"""Swing distillation: the likelier a token is private, the flatter and noisier its target (arXiv 2212.08349)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_same_shape, dropped, kept_terms, log_ratio, pair, wide
from mmkd.losses.numerics import exact, result_dtype


@dataclass(frozen=True)
class Swing:
    """`tau² KL(softmax((teacher + xi) / tau) || softmax(student / tau))`, `tau = tau_min + (tau_max - tau_min) score` a row.

    student, teacher: logits `[R, V]`; score `[R]`: how likely the row's token is private, in [0, 1]; returns `[R]`. xi is
    Gaussian noise of deviation `noise score` on each of the teacher's logits, a function of seed `[R]` (int64, needed where noise
    is above 0) and column alone: it depends on no block and no rank, and a seed that stays with its token gives no second,
    independent look at it in the next epoch. Score 0 is `forward_kl` at tau_min; a high tau makes the target even.

    Source: Swing (arXiv 2212.08349), of which the abstract is known: a temperature a token that follows its score, and noise in
    the targets. The linear rule, noise on logits and its scale, tau² and the defaults are our reading.
    Raises ValueError unless 0 < tau_min <= tau_max and noise >= 0.
    """

    tau_min: float = 1.0
    tau_max: float = 4.0
    noise: float = 0.0

    def __post_init__(self):
        if not 0.0 < self.tau_min <= self.tau_max:
            raise ValueError(f"tau_min is {self.tau_min} and tau_max {self.tau_max}; they must be 0 < tau_min <= tau_max")
        if not self.noise >= 0.0:
            raise ValueError(f"noise is {self.noise}; it must be at least 0")

    def __call__(self, student, teacher, targets, score: Tensor, seed: Tensor | None = None) -> Tensor:
        check_same_shape(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher, tau = self._softened(exact(student), exact(teacher), score, seed)
        terms = teacher.softmax(-1) * log_ratio(student, teacher)  # [R, V]
        return (kept_terms(terms, student, teacher).sum(-1) * tau.squeeze(-1) ** 2).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared, score, seed=None) -> tuple[Tensor, Tensor]:
        student, teacher, tau = self._softened(wide(student), wide(teacher), score, seed)
        q, p, d = pair(student, teacher, 1.0, None)  # [R, V] each
        kept = dropped(p, student)  # [R, V]
        values = (d.mul_(kept).sum(-1, keepdim=True) * tau**2).squeeze(-1)  # [R]
        grad = q.mul_(kept.sum(-1, keepdim=True))  # [R, V]
        return values, grad.sub_(kept).mul_(tau)

    def _softened(self, student, teacher, score, seed) -> tuple[Tensor, Tensor, Tensor]:
        """Both logits over tau, the teacher's with noise, `[R, V]` each, and tau `[R, 1]`."""
        score = score.to(student.dtype).unsqueeze(-1)  # [R, 1]
        tau = self.tau_min + (self.tau_max - self.tau_min) * score  # [R, 1]
        if self.noise > 0.0:
            if seed is None:
                raise ValueError(f"noise is {self.noise}, but the rows have no seeds; give each row one, or set noise to 0")
            teacher = torch.addcmul(teacher, score, gaussian(seed, teacher.shape[-1]).to(teacher.dtype), value=self.noise)
        return student / tau, teacher / tau, tau


def gaussian(seed: Tensor, columns: int) -> Tensor:
    """Standard normal numbers `[R, columns]` (float32), each a function of its row's seed `[R]` (int64) and its column alone."""
    h = _mixed(_mixed(seed & _32_BITS) ^ ((seed >> 32) & _32_BITS)).unsqueeze(-1)  # [R, 1]
    h = _mixed((h + torch.arange(columns, device=seed.device) * 0x9E3779B1) & _32_BITS)  # [R, columns]
    # An odd number over 2^24 is exact in float32, and neither 1 nor -1.
    uniform = (((h >> 8) << 1) + (1 - 2**24)).float() / 2**24  # [R, columns] in (-1, 1)
    return torch.erfinv(uniform).mul_(math.sqrt(2))


_32_BITS = 0xFFFFFFFF


def _mixed(h: Tensor) -> Tensor:
    """A bijection of the numbers below 2^32 that leaves no pattern: xor-shifts and odd factors."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _32_BITS
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _32_BITS
    return h ^ (h >> 16)
