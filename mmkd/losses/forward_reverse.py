"""Forward and reverse KL mixed: by the vocabulary (TopKLD), by which model is surer (BD-KD), by where they differ (adaptive KL).

All are `T² Σ_v [f_v p_v log(p_v / q_v) + r_v q_v log(q_v / p_v)]` with weights f and r that carry no gradient. p =
softmax(teacher / T), q = softmax(student / T); student, teacher `[R, V]`, values `[R]`. Entries where either logit is -inf are
dropped and T² multiplies as in `forward_kl` (T itself is our addition in all three). The gradient is `T (A - q Σ A)` with
`A = r q (1 - log p/q) - f p`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_temperature, dropped, kept_terms, log_ratio, pair, scaled
from mmkd.losses.numerics import exact_dtype, result_dtype

FORMS = ("generalised", "plain")


class _Mixed:
    """What the three share. A subclass gives the weights."""

    temperature: float
    form = "plain"  # "generalised" adds `(f - r) (q - p)` to each entry, and so `(f - r) q` to A

    def weights(self, q: Tensor, p: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Weights f and r, `[R, 1]` or `[R, V]`, from both distributions and the teacher's logits, `[R, V]` each."""
        raise NotImplementedError

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, self.temperature)
        q, p, d = student.softmax(-1), teacher.softmax(-1), log_ratio(student, teacher)  # [R, V] each
        forward, reverse = self.weights(q.detach(), p, teacher)
        terms = (forward * p - reverse * q) * d  # [R, V]
        if self.form == "generalised":
            terms = terms + (forward - reverse) * (q - p)
        return (kept_terms(terms, student, teacher).sum(-1) * self.temperature**2).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared=None) -> tuple[Tensor, Tensor]:
        q, p, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        forward, reverse = self.weights(q, p, teacher)
        p, kept = dropped(p, student), dropped(q, teacher)  # [R, V] each
        terms = (forward * p - reverse * kept).mul_(d)  # [R, V]
        grad = reverse * kept * (1 - d) - forward * p  # [R, V]
        if self.form == "generalised":
            terms += (forward - reverse) * (kept - p)
            grad += (forward - reverse) * kept
        grad.addcmul_(q, grad.sum(-1, keepdim=True), value=-1.0)
        return terms.sum(-1) * self.temperature**2, grad.mul_(self.temperature)


@dataclass(frozen=True)
class TopKLD(_Mixed):
    """Reverse KL on the teacher's k likeliest tokens, forward KL on all others; k = 0 is `forward_kl`, k = V is `reverse_kl`.

    form "plain": the two partial sums as they are. They do not add up to a divergence: the loss can be negative, and where
    student and teacher agree its gradient is not 0 but carries mass from the k tokens to the others. form "generalised" (our
    default) takes both as generalised KLs, `q log(q/p) - q + p` and `p log(p/q) - p + q`: no entry is negative, and only equal
    distributions give 0. At k = 0 and k = V both forms are the same.

    Which of equal logits end the k is left to topk. Source: TopKLD (arXiv 2501.06218, for low-bit autoregressive image models),
    of which we know the idea alone: the plain form is our reading, the generalised form our correction of it, k = 50 our choice
    (theirs is the top-k of sampling). Raises ValueError for k below 0 and for an unknown form.
    """

    k: int = 50
    temperature: float = 1.0
    form: str = "generalised"

    def __post_init__(self):
        if self.k < 0:
            raise ValueError(f"k is {self.k}; it must be at least 0 (0 is the forward KL)")
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; it must be one of {', '.join(FORMS)}")
        check_temperature(self.temperature)

    def weights(self, q, p, teacher):
        ids = teacher.topk(min(self.k, teacher.shape[-1]), dim=-1, sorted=False).indices  # [R, k]
        reverse = torch.zeros_like(p).scatter_(-1, ids, 1.0)  # [R, V]
        return 1 - reverse, reverse


@dataclass(frozen=True)
class BDKD(_Mixed):
    """`a_i forward_kl + b_i reverse_kl`, weighted by whether the student is surer of row i than the teacher.

    `a_i = a boost` where it is surer, H(q_i) < H(p_i), else a: the forward KL spreads its mass. `b_i = b boost` where it is less
    sure, H(q_i) > H(p_i), else b: the reverse KL gathers it. a = b = boost = 1 is the Jeffreys divergence; a = 1, b = 0,
    boost = 1 is `forward_kl`. The cross-entropy is a term of its own, and with a frozen teacher its own loss falls away.

    Source: BD-KD (arXiv 2212.12965), of which we know that a sample's two weights follow from the sign of its entropy gap. Which
    one is raised, and that it is multiplied by one boost, are our reading; a = b = 1 and boost = 2 our choice, as is a row
    (token) as the sample. Raises ValueError for negative a, b or boost, and for a = b = 0.
    """

    a: float = 1.0
    b: float = 1.0
    boost: float = 2.0
    temperature: float = 1.0

    def __post_init__(self):
        if min(self.a, self.b, self.boost) < 0 or self.a == self.b == 0:
            raise ValueError(f"a is {self.a}, b {self.b}, boost {self.boost}; none may be negative, and a and b not both 0")
        check_temperature(self.temperature)

    def weights(self, q, p, teacher):
        gap = (torch.special.entr(p).sum(-1, keepdim=True) - torch.special.entr(q).sum(-1, keepdim=True)).sign()  # [R, 1]
        extra = self.boost - 1
        return self.a * (1 + extra * gap.clamp(min=0)), self.b * (1 + extra * (-gap).clamp(min=0))


@dataclass(frozen=True)
class AdaptiveKL(_Mixed):
    """`(g_h forward_kl + g_t reverse_kl) / (g_h + g_t)`: the KL of the part of the vocabulary in which the two differ more.

    The head is the smallest set of the teacher's likeliest tokens with mass >= mu, the tail the others; `g_h = Σ_head |p - q|`,
    `g_t = Σ_tail |p - q|`. The weights carry no gradient and sum to 1; where p = q they are 1/2 each. mu = 1 is `forward_kl`,
    mu = 0 `reverse_kl`. Tokens of the same probability are in the head together.

    Source: AKL (arXiv 2404.02657), mu 0.5, read in code that follows it. Its code sorts; a search for the probability at the end
    of the head gives the same set at a fraction of the cost. Raises ValueError for mu outside [0, 1].
    """

    mu: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.mu <= 1.0:
            raise ValueError(f"mu is {self.mu}; it must lie in [0, 1] (1 = forward KL, 0 = reverse KL)")
        check_temperature(self.temperature)

    def weights(self, q, p, teacher):
        if self.mu in (0.0, 1.0):
            forward = torch.full_like(p[:, :1], self.mu)  # [R, 1]
            return forward, 1 - forward
        apart = (p - q).abs_()  # [R, V]
        total = apart.sum(-1, keepdim=True)  # [R, 1]
        head = (apart.mul_(p >= _end_of_head(p, self.mu))).sum(-1, keepdim=True)  # [R, 1]
        forward = (head / total).where(total > 0, torch.full_like(total, 0.5))
        return forward, 1 - forward


def _end_of_head(p: Tensor, mu: float) -> Tensor:
    """The largest probability t for which the tokens with p >= t have mass >= mu, 0 < mu < 1. p `[R, V]`; returns `[R, 1]`."""
    # Halving the exponent's range; after the last step no two numbers of the dtype lie between the ends. What is below 2^-64 is
    # no mass.
    wide = torch.zeros_like(p[:, :1], dtype=exact_dtype(p))  # [R, 1]
    low, high, kept = wide - 64, wide + 1, torch.empty_like(p)
    for _ in range(60 if p.dtype == torch.float64 else 31):
        middle = (low + high) / 2
        enough = torch.ge(p, middle.exp2().to(p.dtype), out=kept).mul_(p).sum(-1, keepdim=True) >= mu  # [R, 1]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.exp2().to(p.dtype)
