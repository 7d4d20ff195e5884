"""A term of sparse students: the load of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Term


@register("terms", "load_balance")
@dataclass(frozen=True)
class LoadBalance(Term):
    """Load balance of the experts over a micro-batch's tokens, added up over layers, weighted by tokens.

    The balance is a product of means, so it is one of this micro-batch (as in the published codes); the mean over micro-batches
    and ranks, weighted by tokens, is our choice. On pairs of answers: that of the chosen plus that of the rejected ones (as in
    LLaVA-MoD's code), each a mean over its own tokens.
    """

    origin: ClassVar[str] = "LLaVA-MoD (arXiv 2408.15881), top-2 gating; GShard (arXiv 2006.16668)"
    status: ClassVar[str] = "our choice: mean over micro-batches by tokens"
    needs: ClassVar[tuple[str, ...]] = ("student.routing",)
    count: ClassVar[str] = "token"
    default_weight: ClassVar[float] = 0.01

    def check(self, pair: Pair) -> list[str]:
        if pair.sparse:
            return []
        return [
            "balances experts, but the student has none in this stage; give it or an earlier stage "
            "`upcycle: {experts: 4, top_k: 2}`"
        ]

    def loss(self, signals: Signals) -> Tensor:
        tokens, total = float(signals.counts["token"]), signals.zero
        for inputs, routing in signals["student.routing"]:
            mask = inputs.attention_mask.flatten().bool()
            total = total + losses.balance_of_layers([found.logits for found in routing.values()], mask) * tokens
        return total
