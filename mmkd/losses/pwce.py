"""PWCE: cross-entropy that weighs tokens by their perplexity (LAMO, arXiv 2604.13488)."""

import math
from dataclasses import dataclass

from torch import Tensor

from mmkd.losses.divergence import CrossEntropy, cross_entropy
from mmkd.losses.numerics import exact, result_dtype


@dataclass(frozen=True)
class PWCE:
    """`(1 + lam w) CE` of each row with `w = (1 + a PPL / (m + epsilon)) / (1 + a m / (m + epsilon))`, `PPL = exp CE`.

    student: logits `[R, V]`, targets `[R]`; log_mean `[R]`: log m, m the mean perplexity of all rows that count in the step, over
    ranks and micro-batches, one number seen once a row (`log_mean_perplexity`); returns `[R]`. The mean of w over those rows is 1
    by construction: rows are coupled through m alone, so that for a given m each stands alone. w carries no gradient.
    a = 0 gives `(1 + lam) CE`. The value is infinite, as the cross-entropy is, where the target's logit is -inf.

    Source: LAMO (arXiv 2604.13488) as known from a summary. That the gradient of w is stopped is assumed; a = 1, lam = 1 and
    epsilon are our choice. Raises ValueError for negative a, lam or epsilon.
    """

    a: float = 1.0
    lam: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self):
        if not min(self.a, self.lam, self.epsilon) >= 0.0:
            raise ValueError(f"a is {self.a}, lam {self.lam}, epsilon {self.epsilon}; none may be negative")

    def weights(self, ce: Tensor, log_mean: Tensor) -> Tensor:
        """w of rows with cross-entropies ce `[R]`; float64."""
        ce, log_mean = exact(ce.detach()), exact(log_mean)
        share = 1 / (1 + self.epsilon * (-log_mean).exp())  # [R] m / (m + epsilon)
        return (1 + self.a * share * (ce - log_mean).exp()) / (1 + self.a * share)

    def __call__(self, student: Tensor, teacher: None, targets: Tensor, log_mean: Tensor) -> Tensor:
        ce = cross_entropy(exact(student), targets)  # [R]
        return (ce * (1 + self.lam * self.weights(ce, log_mean))).to(result_dtype(student))

    def value_and_grad(self, student, teacher, targets, shared, log_mean) -> tuple[Tensor, Tensor]:
        ce, grad = CrossEntropy().value_and_grad(student, None, targets, shared)  # [R], [R, V]
        factor = (1 + self.lam * self.weights(ce, log_mean)).to(ce.dtype)  # [R]
        return ce * factor, grad.mul_(factor.unsqueeze(-1))


def log_mean_perplexity(ce: Tensor) -> Tensor:
    """`log mean exp(ce)` of cross-entropies `[R]`; a scalar, float64.

    Over ranks: logsumexp of each rank's `logsumexp(ce)`, less the log of the global number of rows.
    """
    return exact(ce.detach()).logsumexp(-1) - math.log(len(ce))
