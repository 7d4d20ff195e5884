"""TAID: the target moves from the student to the teacher as training goes on (Shing et al., arXiv 2501.16937)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_same_shape, distribution, kept_terms, wide
from mmkd.losses.numerics import exact, exact_dtype, result_dtype


@dataclass(frozen=True)
class TAID:
    """Cross-entropy with a target between student and teacher: `-Σ_v p_v log q_v`, p = softmax((1 - t) student + t teacher).

    student, teacher: logits `[R, V]`; t: `[R]` in [0, 1], one number of the run seen once a row (`TAIDSchedule`); returns `[R]`.
    q = softmax(student). The mixture is one of logits (softened probabilities must not be fed), and no gradient flows through
    it: the gradient is `q - p`, exactly 0 at t = 0. At t = 1 the value is `forward_kl` plus the teacher's entropy.

    Entries where either logit is -inf have no share in p, as for every t between 0 and 1; a row with no other entry gives 0.
    Source: TAID (arXiv 2501.16937) and its released code; no temperature there, so none here.
    """

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, t: Tensor) -> Tensor:
        check_same_shape(student, teacher)
        dtype = result_dtype(student, teacher)
        student, teacher = exact(student), exact(teacher)
        p, _ = _target(student.detach(), teacher, exact(t))  # [R, V]
        return -kept_terms(p * student.log_softmax(-1), student, teacher).sum(-1).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared, t) -> tuple[Tensor, Tensor]:
        student, teacher = wide(student), wide(teacher)
        q, _ = distribution(student, 1.0, "student", shared)  # [R, V]
        p, any_left = _target(student, teacher, t.to(q.dtype))  # [R, V], [R, 1]
        # -log q is the way down from the largest logit and what all others add to its exponential: nothing cancels.
        top, at = student.max(-1, keepdim=True)  # [R, 1] each
        below = (top - student).clamp_(max=_FINITE).mul_(p).sum(-1)  # [R]
        others = q.scatter(-1, at, 0.0).sum(-1, keepdim=True) / q.gather(-1, at)  # [R, 1]
        values = below + (others.log1p() * any_left).squeeze(-1)
        return values, q * any_left - p


_FINITE = 1e30  # times the probability 0 it is 0, which infinity is not


def _target(student: Tensor, teacher: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """p `[R, V]`, and whether the row has an entry with two finite logits, 1 or 0, `[R, 1]`."""
    t = t.unsqueeze(-1)  # [R, 1]
    gone = (student == -math.inf) | (teacher == -math.inf)  # [R, V]
    none = gone.all(-1, keepdim=True)  # [R, 1]
    # Both measured from their largest entry: where p has its mass, the mixture is then of small numbers, which are rounded less.
    mixed = (1 - t) * (student - student.amax(-1, keepdim=True)) + t * (teacher - teacher.amax(-1, keepdim=True))  # [R, V]
    p = mixed.masked_fill_(gone, -math.inf).masked_fill_(none, 0.0).softmax(-1)  # [R, V]
    return p.masked_fill_(gone, 0.0), (~none).to(p.dtype)


@dataclass(frozen=True)
class TAIDSchedule:
    """How TAID's t grows: at least linearly from t_start to t_end, and the faster the more the loss falls.

    `next` takes the state after one step to that after the next. With the loss l of step n,
        rel = (l[n-1] - l[n]) / (l[n-1] + 1e-15)
        momentum = beta momentum + (1 - beta) rel
        t = min(t_end, max(t_start + (t_end - t_start) progress, t + alpha sigmoid(momentum) (1 - t)))
    The first call only remembers the loss. Not adaptive: t is linear in progress.

    The state is one tensor `[3]`: t, momentum, previous loss; it belongs into checkpoints. It is equal on all ranks if the loss
    is that of the whole step, summed over ranks and micro-batches. Nothing waits for the device.
    Source: as TAID, defaults of its released code (t_start 0.2 for a far weaker student). Raises ValueError unless
    0 <= t_start <= t_end <= 1, alpha >= 0 and 0 <= beta <= 1.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True

    def __post_init__(self):
        if not 0.0 <= self.t_start <= self.t_end <= 1.0:
            raise ValueError(f"t_start is {self.t_start} and t_end {self.t_end}; they must be 0 <= t_start <= t_end <= 1")
        if self.alpha < 0.0 or not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"alpha is {self.alpha} and beta {self.beta}; alpha must be at least 0 and beta lie in [0, 1]")

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        state = torch.tensor([self.t_start, 0.0, math.inf], device=device, dtype=torch.float32)
        return state.to(exact_dtype(state)).copy_(torch.tensor([self.t_start, 0.0, math.inf], dtype=torch.float64))

    def next(self, state: Tensor, loss: Tensor | float, progress: float) -> Tensor:
        """The state after a step with this loss; progress: the share of the stage's steps that are done, in [0, 1]."""
        t, momentum, previous = state.unbind()
        loss = torch.as_tensor(loss, device=state.device).detach().to(state.dtype)
        floor = self.t_start + (self.t_end - self.t_start) * progress
        if not self.adaptive:
            return torch.stack([torch.full_like(t, floor), momentum, loss])
        momentum_now = self.beta * momentum + (1 - self.beta) * (previous - loss) / (previous + 1e-15)
        grown = t + self.alpha * momentum_now.sigmoid() * (1 - t)
        later = torch.stack([grown.clamp(min=floor).clamp(max=self.t_end), momentum_now, loss])
        first = torch.stack([t, momentum, loss])
        return torch.where(previous.isinf(), first, later)
