"""Keep the experts of a sparse student evenly used."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()  # [S, E]
    gates = torch.softmax(logits, -1)  # [S, E]
    first = torch.nn.functional.one_hot(logits.detach().argmax(-1), logits.shape[-1]).to(
        gates.dtype
    )  # [S, E]
    counts = gates.new_ones(logits.shape[0]) if mask is None else mask.to(gates.dtype)  # [S]
    number = counts.sum().clamp(min=1)
    # where, not a product alone: a padded token may hold anything, NaN included.
    gates = gates.where(counts.unsqueeze(-1) > 0, torch.zeros_like(gates))
    mean_gate, share = gates.sum(0) / number, (first * counts.unsqueeze(-1)).sum(0) / number  # [E] each
    return logits.shape[-1] * (mean_gate * share).sum()


def balance_of_layers(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over sparse layers of `load_balance`, as LLaVA-MoD adds it up; a scalar.

    router_logits: one `[S, E]` a layer; mask `[S]` (bool): tokens that count, in all of them.
    """
    if not router_logits:
        raise ValueError("there are no router logits: the model has no layer with experts")
    return torch.stack([load_balance(logits, mask) for logits in router_logits]).sum()
