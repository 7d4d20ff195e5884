"""Sparse students: which experts a token goes to, and a loss that keeps them evenly used."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, result_dtype


def load_balance(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """`E Σ_e mean_s g(s, e) · mean_s [first choice of s is e]` with `g = softmax(router_logits)`; a scalar.

    router_logits `[S, E]`: all tokens of one layer; mask `[S]` (bool): tokens that count (leave out padding:
    our choice, the released code counts it). Gradient through g only. It is 1 when both are even; 0 when no
    token counts. Source: the auxiliary loss of LLaVA-MoD (arXiv 2408.15881) as in its top-2 gating, before
    any capacity limit (GShard, arXiv 2006.16668); there summed over layers with factor 0.01.
    """
    if router_logits.dim() != 2 or (mask is not None and mask.shape != router_logits.shape[:1]):
        found = None if mask is None else tuple(mask.shape)
        raise ValueError(
            f"router logits {tuple(router_logits.shape)} and mask {found}; they must be [S, E] and [S]"
        )
    logits = exact(router_logits)  # [S, E]
    gates = torch.softmax(logits, -1)  # [S, E]
    first = torch.nn.functional.one_hot(logits.detach().argmax(-1), logits.shape[-1]).to(
        gates.dtype
    )  # [S, E]
    counts = gates.new_ones(logits.shape[0]) if mask is None else mask.to(gates.dtype)  # [S]
    number = counts.sum().clamp(min=1)
    # where, not a product alone: a padded token may hold anything, NaN included.
    gates = gates.where(counts.unsqueeze(-1) > 0, torch.zeros_like(gates))
    mean_gate, share = gates.sum(0) / number, (first * counts.unsqueeze(-1)).sum(0) / number  # [E] each
    return (logits.shape[-1] * (mean_gate * share).sum()).to(result_dtype(router_logits))


def balance_of_layers(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over sparse layers of `load_balance`, as LLaVA-MoD adds it up; a scalar.

    router_logits: one `[S, E]` a layer; mask `[S]` (bool): tokens that count, in all of them.
    """
    if not router_logits:
        raise ValueError("there are no router logits: the model has no layer with experts")
    return torch.stack([load_balance(logits, mask) for logits in router_logits]).sum()


def choose_experts(
    router_logits: Tensor,
    top_k: int = 2,
    *,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
    second_choice_noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """LLaVA-MoD's gate: weights `[S, k]` and experts `[S, k]` of each token, first choice first.

    router_logits `[S, E]`. The experts are the top_k of each row; with second_choice_noise all but the first are those
    of the logits plus Gumbel noise. The weights are the softmax over all experts at the chosen ones, divided by their
    sum. capacity_factor: an expert takes `ceil(S / E * k * capacity_factor)` tokens, at least min_capacity; first
    choices queue by position, then second ones, and who finds the queue full gets weight 0 there (0 everywhere: only
    the residual connection passes the token on). None: no queue, no token is dropped.

    Differentiable through the weights. Our defaults drop nothing and draw nothing, as transformers' models do; the
    released code has 1.5 and noise (as in its top-2 gate). Raises ValueError for a top_k outside 1 to E.
    """
    if router_logits.dim() != 2 or not 1 <= top_k <= router_logits.shape[-1]:
        raise ValueError(f"router logits {tuple(router_logits.shape)} with top_k {top_k}; they must be [S, E], 1 <= top_k <= E")
    logits = exact(router_logits)  # [S, E]
    experts = _ranked(logits.detach(), top_k, second_choice_noise)  # [S, k]
    weights = torch.softmax(logits, -1).gather(-1, experts)  # [S, k]
    if capacity_factor is not None:
        capacity = max(min_capacity, math.ceil(len(logits) / logits.shape[-1] * top_k * capacity_factor))
        weights = weights * _in_queue(experts, logits.shape[-1], capacity)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return weights.to(result_dtype(router_logits)), experts


def _ranked(logits: Tensor, top_k: int, noise: bool) -> Tensor:
    """Chosen experts, best first. `[S, k]`"""
    if not noise:
        return logits.topk(top_k, dim=-1).indices
    first = logits.argmax(-1, keepdim=True)  # [S, 1]
    gumbel = -torch.empty_like(logits).exponential_().log()
    rest = (logits + gumbel).scatter(-1, first, -math.inf).topk(top_k - 1, dim=-1).indices
    return torch.cat([first, rest], -1)


def _in_queue(experts: Tensor, number: int, capacity: int) -> Tensor:
    """Which choices find room, all first choices before all second ones. `[S, k]` bool"""
    order = torch.nn.functional.one_hot(experts.T.flatten(), number)  # [k * S, E]
    place = (order.cumsum(0) * order).sum(-1)  # [k * S] from 1
    return (place <= capacity).view(experts.shape[1], experts.shape[0]).T
