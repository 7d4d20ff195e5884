"""PLD: distil the teacher's ranking of the tokens, the label first (Plackett-Luce distillation, arXiv 2506.12542)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import ABSENT, check_same_shape, check_temperature, distribution, wide
from mmkd.losses.numerics import exact, result_dtype


@dataclass(frozen=True)
class PLD:
    """`Σ_r alpha_r [log Σ_{j ranked from r on} exp z_j - z_r]` of each row; rank 0 is the label, then the teacher's k likeliest.

    z: the student's logits; alpha_r = softmax(teacher / T) of the token at rank r; student, teacher `[R, V]`, targets `[R]`,
    returns `[R]`. One term in the place of cross-entropy and distillation. Order and weights carry no gradient. It is convex in
    z, and all alpha on the label make it the cross-entropy.

    k: after this rank the sum ends; k >= V - 1 is the paper's, over all classes. What is not ranked still stands in every
    logarithm, so a smaller k leaves out terms of small alpha and changes no other, and no logit goes untrained (the catalogue's
    reading, in which the k + 1 tokens are all classes there are, would leave the others free). Needs memory for some 20 k float64
    a row. Equal logits of the teacher are ranked by their index (which of them end the k is left to topk).

    Source: PLD (arXiv 2506.12542), read in full text. T at the weights alone is our reading of its temperature (4 for CIFAR-100);
    T = 1 and k = 64 are our choice. Entries where the student's logit is -inf are dropped, the label's too.
    Raises ValueError for k below 1.
    """

    k: int = 64
    temperature: float = 1.0

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1 (the cross-entropy alone is cross_entropy)")
        check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        check_same_shape(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher = exact(student), exact(teacher)
        ids = _ranks(teacher, targets, self.k)  # [R, k + 1]
        z, alpha = student.gather(-1, ids), (teacher / self.temperature).softmax(-1).gather(-1, ids)  # [R, k + 1] each
        rest = student.scatter(-1, ids, ABSENT).logsumexp(-1, keepdim=True)  # [R, 1]
        z, alpha = z.masked_fill(z == -math.inf, ABSENT), alpha * (z != -math.inf)
        return (alpha * (_from_rank_on(z, rest) - z)).sum(-1).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        student, teacher = wide(student), wide(teacher)
        p, _ = distribution(teacher, self.temperature, "teacher", shared)  # [R, V]
        ids = _ranks(teacher, targets, self.k)  # [R, k + 1]
        z, alpha = exact(student.gather(-1, ids)), exact(p.gather(-1, ids))  # [R, k + 1] each
        z, alpha = z.masked_fill(z == -math.inf, ABSENT), alpha * (z != -math.inf)
        left = student.scatter(-1, ids, ABSENT)  # [R, V]
        top = left.amax(-1, keepdim=True)  # [R, 1]
        left = left.sub_(top).exp_()  # [R, V]
        log_all = _from_rank_on(z, exact(top) + exact(left.sum(-1, keepdim=True)).log())  # [R, k + 1]
        # A logit of rank r stands in the logarithms of the ranks up to r, one that is not ranked in all of them.
        share = (alpha.log() - log_all).logcumsumexp(-1)  # [R, k + 1] log Σ_{i <= r} alpha_i / Σ_{from i on} exp z
        grad = left.mul_((share[:, -1:] + exact(top)).exp().to(left.dtype))  # [R, V]
        grad.scatter_(-1, ids, ((share + z).exp() - alpha).to(grad.dtype))
        return (alpha * (log_all - z)).sum(-1).to(grad.dtype), grad


def _ranks(teacher: Tensor, targets: Tensor, k: int) -> Tensor:
    """Ids `[R, k + 1]`: the label, then the teacher's k likeliest other tokens, likeliest first."""
    label = targets.unsqueeze(-1)  # [R, 1]
    others = teacher.clamp(min=ABSENT).scatter(-1, label, -math.inf)  # [R, V] the label below all, even below -inf
    ids = others.topk(min(k, teacher.shape[-1] - 1), dim=-1, sorted=False).indices.sort(dim=-1).values
    order = others.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return torch.cat([label, ids.gather(-1, order)], -1)


def _from_rank_on(z: Tensor, rest: Tensor) -> Tensor:
    """`log Σ_{j >= r} exp z_j` with what is not ranked, for each rank. z `[R, k + 1]`, rest `[R, 1]`; returns `[R, k + 1]`."""
    return torch.cat([z, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[:, :-1]
