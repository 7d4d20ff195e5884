"""DAC-KL: forward KL on the dense part of the teacher's distribution, whose borders are learned (MGSR, arXiv 2407.10068)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd.losses.distributions import check_temperature, dropped, kept_terms, log_ratio, pair, scaled
from mmkd.losses.numerics import result_dtype

_LEAST = 1e-30  # probability of the bucket below which it counts as this


@dataclass(frozen=True)
class DACKL:
    """`T² (Σ_v g_v p_v log(p_v / q_v) + P log(P / Q))`, g the share of token v in the band, P and Q all that is outside it.

    p = softmax(teacher / T), q = softmax(student / T), `P = Σ (1 - g) p`, `Q = Σ (1 - g) q`; student, teacher `[R, V]`; l, u:
    the band's ends `[R]`, 0 <= l <= u <= 1; returns `[R]`. Token v stands at the teacher's mass of all less likely tokens and
    half its own, from 0 (unlikely) to 1; g is 1 from l to u and falls to 0 linearly within softness beyond (0: at once). Band
    [0, 1] is `forward_kl`, an empty one 0; a wider band is never less. The gradient to the student has a closed form; the plain
    call is differentiable in l and u too where softness is above 0 (`DenseBand`). Equal probabilities stand in the order of their
    indices. One sort of the vocabulary a row, which on a CPU takes some 20 times as long as a softmax.

    Source: MGSR (arXiv 2407.10068, token level), known from reviews: an MLP reads the teacher's distribution and gives an upper
    and a lower quantile, and only tokens between them enter the KL. That quantiles are of cumulative mass, the bucket
    (renormalised, the loss would say nothing of what the student puts outside), softness 0.1 and T are our choice.
    """

    softness: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.softness <= 1.0:
            raise ValueError(f"softness is {self.softness}; it must lie in [0, 1]")
        check_temperature(self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
        dtype = result_dtype(student, teacher)
        student, teacher = scaled(student, teacher, self.temperature)
        q, p = student.softmax(-1), teacher.softmax(-1)  # [R, V] each
        inside = self._inside(p, l, u)  # [R, V]
        terms = kept_terms(inside * p * log_ratio(student, teacher), student, teacher)  # [R, V]
        outside, others = ((1 - inside) * p).sum(-1), ((1 - inside) * q).sum(-1)  # [R] each
        rest = outside * (outside.clamp(min=_LEAST) / others.clamp(min=_LEAST)).log()  # [R]
        return ((terms.sum(-1) + rest) * self.temperature**2).to(dtype)

    def value_and_grad(self, student, teacher, targets, shared, l, u) -> tuple[Tensor, Tensor]:  # noqa: E741
        q, p, d = pair(student, teacher, self.temperature, shared)  # [R, V] each
        inside = self._inside(p, l, u)  # [R, V]
        outside = ((1 - inside) * p).sum(-1, keepdim=True)  # [R, 1]
        spread = (1 - inside).mul_(q)  # [R, V]
        ratio = outside / spread.sum(-1, keepdim=True).clamp(min=_LEAST)  # [R, 1]
        kept = inside.mul_(dropped(p, student))  # [R, V]
        rest = outside * (outside.clamp(min=_LEAST).log() - spread.sum(-1, keepdim=True).clamp(min=_LEAST).log())
        values = ((kept * d).sum(-1) + rest.squeeze(-1)) * self.temperature**2  # [R]
        grad = spread.mul_(ratio).add_(kept).neg_()  # [R, V]
        grad.addcmul_(q, grad.sum(-1, keepdim=True), value=-1.0)
        return values, grad.mul_(self.temperature)

    def _inside(self, p: Tensor, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
        """g, `[R, V]`."""
        low, high = l.to(p.dtype).unsqueeze(-1), u.to(p.dtype).unsqueeze(-1)  # [R, 1] each
        place = _mass_below(p)  # [R, V]
        if self.softness == 0.0:
            return ((place >= low) & (place <= high)).to(p.dtype)
        beyond = torch.maximum(low - place, place - high)  # [R, V] 0 or less in the band
        return (1 - beyond.clamp(min=0) / self.softness).clamp(min=0)


def _mass_below(p: Tensor) -> Tensor:
    """The mass of all tokens less likely than each, and half its own. p `[R, V]`; returns `[R, V]`, in [0, 1]."""
    ordered, ids = torch.sort(p, dim=-1, stable=True)  # [R, V] each, from small to large
    place = (ordered.cumsum(-1) - ordered / 2).clamp_(0, 1)  # [R, V]
    return torch.empty_like(p).scatter_(-1, ids, place)


class DenseBand(nn.Module):
    """The ends l and u of each row's band, from the teacher's likeliest tokens, trained with the student.

    Minimised over the band alone, DAC-KL always narrows it, down to nothing; `least` is the width that is always left. At the
    start the band is nearly [0, 1]. Depth, width, input and least are our choice: the paper's are not known.
    """

    def __init__(self, inputs: int = 32, hidden: int = 64, least: float = 0.5):
        super().__init__()
        if not 0.0 <= least <= 1.0:
            raise ValueError(f"least is {least}; it is a width of the band, in [0, 1]")
        self.inputs, self.least = inputs, least
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 2))
        nn.init.zeros_(self.layers[-1].weight)
        with torch.no_grad():
            self.layers[-1].bias.copy_(torch.tensor([4.0, 0.0]))  # nearly all of the free width, in the middle

    def forward(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs `[R, inputs]`: of the teacher's likeliest tokens, likeliest first. Returns l and u, `[R]` each."""
        wide, place = self.layers(log_probs.clamp(min=-20.0) / 10).sigmoid().unbind(-1)  # [R] each
        width = self.least + (1 - self.least) * wide
        low = (1 - width) * place
        return low, low + width
