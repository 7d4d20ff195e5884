"""Forward KL against a teacher of which only the k likeliest tokens are known, and how likely all others are together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import ABSENT
from mmkd.losses.divergence import jsd
from mmkd.losses.numerics import exact, result_dtype


def top_k_forward_kl(student: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    """`Σ_{i in top-k} p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)` of each row.

    student `[R, V]` logits; ids `[R, k]` of the teacher's likeliest tokens, log_probs `[R, k]` theirs, tail `[R]` the log of
    what is left; returns `[R]`. It is the KL of the two distributions after the other tokens are put into one bucket: never
    above the full KL, and equal to it if the student spreads its rest as the teacher does. The rest's mass keeps q from
    growing without bound on the k tokens, as renormalised top-k losses let it.
    """
    log_q, log_rest = _coarse(exact(student), ids)  # [R, k], [R]
    return _values(log_q, log_rest, exact(log_probs), exact(tail)).to(result_dtype(student))


@dataclass(frozen=True)
class TopKForwardKL:
    """`top_k_forward_kl` as a row loss; gradient `q - p` on the k tokens and `q (1 - p_rest / q_rest)` on the others."""

    def __call__(self, student: Tensor, teacher: None, targets: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
        return top_k_forward_kl(student, ids, log_probs, tail)

    def value_and_grad(self, student, teacher, targets, shared, ids, log_probs, tail) -> tuple[Tensor, Tensor]:
        wide = student.to(result_dtype(student))
        log_q, log_rest = _coarse(wide, ids)  # [R, k], [R]
        log_p, log_tail = log_probs.to(wide.dtype), tail.to(wide.dtype)
        values = _values(log_q, log_rest, log_p, log_tail)
        grad = torch.softmax(wide, -1)  # [R, V]
        # Where the student's rest has vanished, so has its gradient; the ratio alone could overflow.
        ratio = (log_tail - log_rest).clamp(max=_FAR).exp()  # [R]
        grad.mul_(1 - ratio.unsqueeze(-1))
        return values, grad.scatter_(-1, ids, log_q.exp() - log_p.exp())


def top_k_jsd(student: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor, beta: float = 0.5) -> Tensor:
    """`jsd` of the two distributions after all tokens but the teacher's k likeliest are put into one bucket; as there, `[R]`.

    A divergence of coarser distributions is never above the full one. beta lies in [0, 1): at 1, reverse KL, what the student
    finds likely and the teacher does not would all be in the bucket. Arguments as those of `top_k_forward_kl`. Raises ValueError.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; against a top-k teacher it must lie in [0, 1)")
    if beta == 0:
        return top_k_forward_kl(student, ids, log_probs, tail)
    log_q, log_rest = _coarse(exact(student), ids)  # [R, k], [R]
    own, other = torch.cat([log_q, log_rest[:, None]], -1), torch.cat([exact(log_probs), exact(tail)[:, None]], -1)  # [R, k + 1]
    return jsd(own, other, beta).to(result_dtype(student))


@dataclass(frozen=True)
class TopKJSD:
    """`top_k_jsd` as a row loss."""

    beta: float = 0.5

    def __call__(self, student: Tensor, teacher: None, targets: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
        return top_k_jsd(student, ids, log_probs, tail, self.beta)


_FAR = 80.0  # exp(80) is finite in float32


def _values(log_q: Tensor, log_rest: Tensor, log_p: Tensor, log_tail: Tensor) -> Tensor:
    p, rest = log_p.exp(), log_tail.exp()
    return (p * (log_p - log_q)).sum(-1) + rest * (log_tail - log_rest).where(rest > 0, 0.0)


def _coarse(student: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities of the k tokens `[R, k]`, and of all others together `[R]`."""
    normaliser = student.logsumexp(-1)  # [R]
    # With every token among the k, nothing is left.
    rest = student.scatter(-1, ids, ABSENT).logsumexp(-1)  # [R]
    return student.gather(-1, ids) - normaliser.unsqueeze(-1), rest - normaliser
