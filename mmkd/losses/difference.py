"""DBiLD: distil the differences between the informative logits of a row (Switch-KD, arXiv 2604.14629).

It extends BiLD (arXiv 2406.13555: fixed k, forward KL) by a knee rule for k and the reverse KL. What the
paper's readable parts leave open is our choice and an argument here: the window of the knee, the least k, no
T² factor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_same_shape
from mmkd.losses.numerics import exact, result_dtype

DIRECTIONS = ("reverse", "forward")


def dbild(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 3.0,
    window: int = 64,
    min_k: int = 4,
    max_k: int | None = None,
    direction: str = "reverse",
    tau_squared: bool = False,
    fixed_k: int | None = None,
    inclusive: bool = True,
) -> Tensor:
    """Dynamic bi-directional logits difference loss, one value a row.

    Teacher-led branch: I = the k largest entries of the teacher, largest first; `d = z[I_a] - z[I_b]` for all
    a < b, for both models; KL between softmax(d / temperature) of both models. Student-led branch: the
    same with I taken from the student. The loss is the sum of both (Switch-KD, figure; eq. 7, 14, 15 as
    reported by others).

    student, teacher: logits `[R, V]`; returns `[R]`. The teacher is detached and so are both choices of
    indices.
    window: the knee is looked for among this many largest logits (our choice: the paper gives none); k comes
    from `kneedle_k` with min_k, max_k and inclusive, or is `fixed_k` (BiLD: 8).
    direction: "reverse" is KL(student || teacher) as in Switch-KD, "forward" is BiLD's.
    tau_squared: multiply by temperature² (neither paper does).

    Equal logits of a leader stand in the order of their indices (which of them end a window is left to topk).
    An entry that is -inf in the leader is never chosen, one that is -inf in the follower is left out. Fewer
    than three entries have no distribution to compare (one difference at most), so such a branch gives
    exactly 0 with gradient 0. A logit more than 300 temperatures below the largest one counts as 300 below.

    Cost: O(V) for the two top-k, then O(window) a row, in float64; the k(k-1)/2 differences are never formed.
    Raises ValueError for unequal shapes, temperature <= 0, window or min_k below 1, or an unknown direction.
    """
    loss = DBiLD(temperature, window, min_k, max_k, direction, tau_squared, fixed_k, inclusive)
    return loss(student, teacher)


def kneedle_k(logits: Tensor, min_k: int = 4, max_k: int | None = None, inclusive: bool = True) -> Tensor:
    """How many of the largest logits stand before the knee of each row's sorted curve.

    logits: `[R, K]`, **sorted from large to small**, K the window; returns `[R]` (int64).
    `x_i = (i-1)/(K-1)`, `y_i = (s_i - s_K)/(s_1 - s_K)`, k = the first i (from 1) with the largest gap `(1 -
    x_i) - y_i` below the chord, the knee included (without it where inclusive is false); then clamped to [min_k,
    min(max_k, K)]. A flat row has all gaps 0, so raw k = 1. -inf entries stand at the end and do not count: K is then
    the number of finite ones. Source: knee as in Switch-KD's figure (Kneedle, Satopää et al. 2011); inclusive k and
    the clamp are our choice.
    """
    gaps, count = _gaps(logits)  # [R, K], [R]
    k = gaps.argmax(-1) + int(inclusive)  # [R] the first maximum
    top = count if max_k is None else count.clamp(max=max_k)
    return torch.minimum(k.clamp(min=min_k), top)


@dataclass(frozen=True)
class DBiLD:
    """`dbild` as a row loss `(student, teacher, targets) -> [R]`; its gradient is 0 but in the two windows."""

    temperature: float = 3.0
    window: int = 64
    min_k: int = 4
    max_k: int | None = None
    direction: str = "reverse"
    tau_squared: bool = False
    fixed_k: int | None = None
    inclusive: bool = True

    def __post_init__(self):
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        for name in ("window", "min_k", "max_k", "fixed_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}; it must be one of {', '.join(DIRECTIONS)}")

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        check_same_shape(student, teacher)
        teacher = teacher.detach()
        lead_t, ids_t = self._top(teacher)  # [R, W]
        _, ids_s = self._top(student.detach())  # [R, W]
        teacher_led = self._branch(student.gather(-1, ids_t), lead_t, lead_t)  # [R]
        student_rows = student.gather(-1, ids_s)  # [R, W]
        student_led = self._branch(student_rows, teacher.gather(-1, ids_s), student_rows.detach())  # [R]
        return (teacher_led + student_led).to(result_dtype(student, teacher))

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        values, ids, entries = self.value_and_entries(student, teacher, targets, shared)
        return values, torch.zeros_like(student, dtype=entries.dtype).scatter_add_(-1, ids, entries)

    @property
    def entries(self) -> int:
        """In how many columns, at most, a row's gradient is not 0."""
        return 2 * (self.window if self.fixed_k is None else self.fixed_k)

    def value_and_entries(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor, Tensor]:
        """Values `[R]`, columns `[R, k]` and the gradient there `[R, k]`; a column may stand twice, its entries then add up."""
        check_same_shape(student, teacher)
        lead_t, ids_t = self._top(teacher)  # [R, W]
        lead_s, ids_s = self._top(student)  # [R, W]
        follow_t = teacher.gather(-1, ids_s)  # [R, W]
        with torch.enable_grad():
            by_teacher = student.gather(-1, ids_t).requires_grad_()  # [R, W]
            by_student = lead_s.clone().requires_grad_()  # [R, W]
            values = self._branch(by_teacher, lead_t, lead_t) + self._branch(by_student, follow_t, lead_s)
            grads = torch.autograd.grad(values.sum(), (by_teacher, by_student))
        dtype = result_dtype(student, teacher)
        return values.detach().to(dtype), torch.cat([ids_t, ids_s], -1), torch.cat(grads, -1).to(dtype)

    def _top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The leader's window, largest first, equal logits by their index; values and indices, `[R, W]` each."""
        size = self.window if self.fixed_k is None else self.fixed_k
        _, ids = logits.topk(min(size, logits.shape[-1]), dim=-1, sorted=False)
        # topk gives equal logits, which half precision is full of, in an order of the device's own.
        ids = ids.sort(dim=-1).values
        values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        return values, ids.gather(-1, order)

    def _branch(self, student: Tensor, teacher: Tensor, leader: Tensor) -> Tensor:
        """KL between the pairwise differences of two windows `[R, W]`, both in the order of `leader`; returns
        `[R]`."""
        if self.fixed_k is None:
            k = kneedle_k(leader, self.min_k, self.max_k, self.inclusive)  # [R]
        else:
            k = torch.full_like(leader[:, 0], self.fixed_k, dtype=torch.long)  # [R]
        rank = torch.arange(leader.shape[-1], device=leader.device)  # [W]
        used = (rank < k.unsqueeze(-1)) & (student != -math.inf) & (teacher != -math.inf)  # [R, W]
        a_s = _window(student, used, self.temperature)  # [R, W]
        a_t = _window(teacher, used, self.temperature)  # [R, W]
        over, under = (a_s, a_t) if self.direction == "reverse" else (a_t, a_s)
        # KL(over || under) = Σ_ab w_ab (log w_ab - log v_ab), where log w_ab - log v_ab = r_a - r_b
        # - logZ + logZ'. Summed over b and a first, only the row and column sums of the pair weights w remain.
        rows, columns, log_total = _pair_sums(over, used)
        _, _, log_total_under = _pair_sums(under, used)
        kl = ((over - under) * (rows - columns)).sum(-1) - log_total + log_total_under  # [R]
        kl = kl.where(used.sum(-1) > 2, torch.zeros_like(kl))
        return kl * self.temperature**2 if self.tau_squared else kl


def _window(logits: Tensor, used: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, less their maximum, in [-reach, 0]; 0 where not used."""
    a = exact(logits).masked_fill(~used, -math.inf) / temperature  # [R, W]
    top = a.detach().amax(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)  # [R, 1] 0 for a row without any
    reach = 300.0 if a.dtype == torch.float64 else 40.0  # exp(-2 reach) is still a normal number
    return (a - top).clamp(min=-reach).masked_fill(~used, 0.0)


def _pair_sums(a: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums, column sums and log-total of the pair weights `exp(a_i - a_j)`, i < j, normalised to 1.

    a, used `[R, W]`; returns `[R, W]`, `[R, W]`, `[R]`. `exp(a_i - a_j)` factors, so two running sums do it.
    """
    low = a.detach().amin(-1, keepdim=True)  # [R, 1]
    up = a.exp() * used  # [R, W]
    down = (low - a).exp() * used  # [R, W]
    after = down.flip(-1).cumsum(-1).flip(-1)  # [R, W] Σ_{j >= i}
    after = torch.nn.functional.pad(after[:, 1:], (0, 1))  # [R, W] Σ_{j > i}
    before = torch.nn.functional.pad(up.cumsum(-1)[:, :-1], (1, 0))  # [R, W] Σ_{i < j}
    rows, columns = up * after, before * down  # [R, W] each
    # A row without a pair has total 0; its loss is set to 0 later, here it only must not become NaN.
    total = rows.sum(-1, keepdim=True)  # [R, 1]
    total = total.masked_fill(total == 0, 1.0)
    return rows / total, columns / total, (total.log() - low).squeeze(-1)


def _gaps(logits: Tensor) -> tuple[Tensor, Tensor]:
    s = exact(logits.detach())  # [R, K]
    finite = s != -math.inf  # [R, K]
    count = finite.sum(-1)  # [R]
    last = (count - 1).clamp(min=0).unsqueeze(-1)  # [R, 1]
    end = s.gather(-1, last)  # [R, 1]
    height = s[:, :1] - end  # [R, 1]
    x = torch.arange(s.shape[-1], device=s.device, dtype=s.dtype) / last.clamp(min=1)  # [R, K]
    y = (s - end) / height.where(height > 0, torch.ones_like(height))  # [R, K]
    gaps = (1 - x - y).where(height > 0, torch.zeros_like(x))  # [R, K]
    return gaps.masked_fill(~finite, -math.inf), count
