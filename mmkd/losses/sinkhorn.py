"""SinKD: the cheapest way to carry the teacher's rows of a batch into the student's (Sinkhorn distillation, arXiv 2402.17110).

It couples all rows that it is given, so it is no loss of the row engine, and which rows meet must not depend on how a batch is
cut. Over ranks: gather the rows of all, with gradient, and let each rank add up the values of its own rows; losses and gradients
then sum to those of one process. With detach_plan the gather needs no gradient. Micro-batches are couplings of their own:
two of n rows are not one of 2 n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_same_shape, check_temperature
from mmkd.losses.numerics import exact, result_dtype


@dataclass(frozen=True)
class SinKD:
    """`Σ_j K_ij W_ij` of each student row i, with costs `W_ij = |softmax(student_i / T) - softmax(teacher_j / T)|_1`.

    K starts as `exp(-W / epsilon)`; its rows and then its columns are divided by their sums, iterations times, so that in the end
    each teacher row is carried whole. student, teacher: logits `[n, V]` of the same n rows; returns `[n]`, whose sum is the loss
    (a sum over rows, not their mean; no T²). The gradient flows through K too, unless detach_plan.

    Time n² V, memory n V and n² a matrix: take 256 rows at most, and of the vocabulary what `union_of_top` names. One row gives
    `|q - p|_1`. Equal models do not give 0 but what epsilon lets rows mix; it goes to 0 with epsilon if the rows differ.

    Source: SinKD (arXiv 2402.17110) and its released code, with its T 2, epsilon 0.1, 20 iterations and gradient through K; its
    weights are 8e-4 (decoders) and 2e-3 (classifiers). detach_plan, fewer columns and logarithms inside are our additions.
    Raises ValueError for options out of range and for unequal shapes.
    """

    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 20
    detach_plan: bool = False

    def __post_init__(self):
        check_temperature(self.temperature)
        if not self.epsilon > 0.0 or self.iterations < 1:
            raise ValueError(f"epsilon is {self.epsilon} and iterations {self.iterations}; epsilon must be above 0, iterations "
                             "at least 1")  # fmt: skip

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_same_shape(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher = exact(student) / self.temperature, exact(teacher.detach()) / self.temperature
        cost = _Manhattan.apply(student.softmax(-1), teacher.softmax(-1))  # [n, n]
        return (self.plan(cost) * cost).sum(-1).to(dtype)

    def plan(self, cost: Tensor) -> Tensor:
        """K of the costs `[n, n]`: how much of each teacher row (column) goes to each student row. `[n, n]`"""
        log_plan = (cost.detach() if self.detach_plan else cost) / -self.epsilon
        for _ in range(self.iterations):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        return log_plan.exp()


def union_of_top(logits: Tensor, k: int) -> Tensor:
    """Ids, in order, that are among the k largest of any row: the columns on which rows are compared. logits `[n, V]`; `[U]`."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False).indices.unique()


class _Manhattan(torch.autograd.Function):
    """`|q_i - p_j|_1`, `[n, n]`, with gradient to q. The one of torch.cdist takes memory for n² V numbers on a GPU."""

    @staticmethod
    def forward(ctx, q, p):
        ctx.save_for_backward(q, p)
        return torch.cdist(q, p, p=1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        q, p = ctx.saved_tensors
        to_q = torch.zeros_like(q)  # [n, V]
        for row, column in zip(p, gradient.T, strict=True):
            to_q.addcmul_((q - row).sign_(), column.unsqueeze(-1))
        return to_q, None
