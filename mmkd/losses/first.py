"""FIRST: distil the teacher's few likeliest tokens, after calibrating their probabilities (arXiv 2408.12168)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import ABSENT, distribution, wide
from mmkd.losses.numerics import exact, result_dtype

NORMALISE = ("softmax", "linear")
_LEAST = 1e-30  # probability below which a logarithm is not taken


@dataclass(frozen=True)
class FIRST:
    """`Σ_i t_i (log t_i - log s_i)` over the teacher's k likeliest tokens: t from its probabilities P, s from the student's, x.

    normalise "softmax": `t = softmax(P / c)`, `s = softmax(x / student_temperature)`, of probabilities, not of logits: a small c
    sharpens, a large one makes t even. "linear": `t = (P + epsilon) / Σ (P + epsilon)`, s likewise, without c and
    student_temperature; with epsilon 0 and k = V it is `forward_kl`. other: one more entry, the probability of all other tokens.
    label_smoothing: so much of the likeliest token's t, at most all of it, goes to the other entries in equal parts.

    student `[R, V]` logits; ids, log_probs `[R, K]`, K >= k: the teacher's tokens, likeliest first, as top-k signals are stored
    (its own logits are not needed); returns `[R]`. `calibrated_c` finds c.

    Source: FIRST (arXiv 2408.12168) and its released code, read: k 5, softmax, both temperatures 1 before calibration, epsilon
    1e-6, sums over tokens, no cross-entropy. The other entry and label smoothing act on logarithms there, which cannot be meant;
    how they are done here is our reading. Raises ValueError for options out of range and for K < k.
    """

    c: float = 1.0
    k: int = 5
    normalise: str = "softmax"
    other: bool = False
    label_smoothing: float = 0.0
    student_temperature: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self):
        _check(self)

    def target(self, log_probs: Tensor) -> Tensor:
        """t of the teacher's log-probabilities `[R, K]`: `[R, k]`, or `[R, k + 1]` with the other entry last."""
        if log_probs.shape[-1] < self.k:
            raise ValueError(f"k is {self.k}, but of the teacher {log_probs.shape[-1]} tokens are known; store more, or lower k")
        p = exact(log_probs[:, : self.k]).exp()  # [R, k]
        p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1) if self.other else p
        t = _log_shares(p, self, self.c).exp()  # [R, k (+ 1)]
        taken = t[:, :1].clamp(max=self.label_smoothing)  # [R, 1]
        return torch.cat([t[:, :1] - taken, t[:, 1:] + taken / (t.shape[-1] - 1)], -1)

    def __call__(self, student: Tensor, teacher: None, targets: Tensor | None, ids: Tensor, log_probs: Tensor) -> Tensor:
        logits, ids, t = exact(student), ids[:, : self.k], self.target(log_probs)
        rest = logits.scatter(-1, ids, ABSENT).logsumexp(-1, keepdim=True)  # [R, 1]
        entries = torch.cat([logits.gather(-1, ids), rest], -1)[:, : t.shape[-1]]  # [R, k (+ 1)]
        log_s = _log_shares((entries - logits.logsumexp(-1, keepdim=True)).exp(), self, self.student_temperature)
        return (torch.xlogy(t, t) - t * log_s).sum(-1).to(result_dtype(student))

    def value_and_grad(self, student, teacher, targets, shared, ids, log_probs) -> tuple[Tensor, Tensor]:
        q, _ = distribution(wide(student), 1.0, "student", shared)  # [R, V]
        ids, t = ids[:, : self.k], self.target(log_probs)
        x = _chosen_and_rest(wide(student), q, ids)[:, : t.shape[-1]]  # [R, k (+ 1)]
        log_s = _log_shares(x, self, self.student_temperature)  # [R, k (+ 1)]
        raised = (x + self.epsilon).clamp(min=_LEAST)
        linear = 1 / raised.sum(-1, keepdim=True) - t / raised  # the gradient to x, [R, k (+ 1)]
        to_x = linear if self.normalise == "linear" else (log_s.exp() - t) / self.student_temperature
        mean = (to_x * x).sum(-1, keepdim=True)  # [R, 1]
        grad = q * ((to_x[:, -1:] if self.other else 0.0) - mean).to(q.dtype)  # [R, V]
        grad.scatter_(-1, ids, (x * (to_x - mean))[:, : self.k].to(q.dtype))
        return (torch.xlogy(t, t) - t * log_s).sum(-1).to(q.dtype), grad


def _check(loss: FIRST) -> None:
    if not (loss.c > 0.0 and loss.student_temperature > 0.0):
        raise ValueError(f"c is {loss.c} and student_temperature {loss.student_temperature}; both must be above 0")
    if loss.k < 2:
        raise ValueError(f"k is {loss.k}; it must be at least 2, because one token's share is always 1")
    if loss.normalise not in NORMALISE:
        raise ValueError(f"normalise is {loss.normalise!r}; it must be one of {', '.join(NORMALISE)}")
    if not 0.0 <= loss.label_smoothing < 1.0 or loss.epsilon < 0.0:
        found = f"label_smoothing is {loss.label_smoothing} and epsilon {loss.epsilon}"
        raise ValueError(f"{found}; label_smoothing must lie in [0, 1) and epsilon be at least 0")


def _log_shares(x: Tensor, loss: FIRST, temperature: float) -> Tensor:
    """Logarithms of the normalised probabilities, `[R, k (+ 1)]` as x."""
    if loss.normalise == "softmax":
        return (x / temperature).log_softmax(-1)
    raised = (x + loss.epsilon).clamp(min=_LEAST)
    return (raised / raised.sum(-1, keepdim=True)).log()


def _chosen_and_rest(logits: Tensor, q: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the tokens `ids` `[R, k]` and of all others, `[R, k + 1]`: the softmax q `[R, V]` in float64.

    Where t and s are close, rounded probabilities would leave little of their difference.
    """
    top = logits.amax(-1, keepdim=True)  # [R, 1]
    chosen = (exact(logits.gather(-1, ids)) - exact(top)).exp()  # [R, k]
    rest = exact(q.scatter(-1, ids, 0.0).sum(-1, keepdim=True) / q.amax(-1, keepdim=True))  # [R, 1]
    both = torch.cat([chosen, rest], -1)
    return both / both.sum(-1, keepdim=True)


def calibrated_c(log_probs: Tensor, correct: Tensor, k: int = 5, bins: int = 10) -> float:
    """The c of `FIRST` in (0, 1] with the smallest expected calibration error of the teacher's largest share t.

    log_probs `[N, K]`: of the teacher's likeliest tokens, likeliest first, over a validation set; correct `[N]` bool: whether
    the likeliest is the right one. Looked for in steps of 0.1, then of 0.02 around the best; of equal ones the largest. Source:
    FIRST; its number of bins is not known, 10 our choice. Raises ValueError for an empty set.
    """
    if not len(correct):
        raise ValueError("no token to calibrate on; give a validation set with answers")

    def error(hundredths: int) -> float:
        confidence = FIRST(hundredths / 100, k).target(log_probs)[:, 0]
        return expected_calibration_error(confidence, correct, bins)

    best = min(range(100, 0, -10), key=error)
    return min((n for n in range(best + 8, best - 9, -2) if 0 < n <= 100), key=error) / 100


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """`Σ_b N_b / N |share of right ones in b - mean confidence in b|` over bins of equal width; confidence, correct `[N]`.

    A confidence at a border belongs to the lower bin. Source: Guo et al., arXiv 1706.04599, eq. 3.
    """
    place = (exact(confidence) * bins).ceil().long().clamp(1, bins) - 1  # [N]
    surplus = torch.zeros(bins, dtype=exact(confidence).dtype, device=place.device)
    surplus.index_add_(0, place, exact(correct) - exact(confidence))
    return (surplus.abs().sum() / len(place)).item()
