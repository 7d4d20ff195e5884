"""The optimisers of a stage, by name: PyTorch's, and bitsandbytes' with states of 8 bits or in paged memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Optimiser:
    """One optimiser.

    path: "module:Class".  takes: the keys of a recipe that its class takes too.  options: what it is always given.
    moments: numbers of 32 bits that it keeps of each weight.  paged: whether its states move between GPU and host.
    """

    path: str
    takes: tuple[str, ...] = ("betas",)
    options: Mapping[str, Any] = field(default_factory=dict)
    moments: float = 2
    paged: bool = False

    @property
    def library(self) -> str:
        return self.path.partition(".")[0]


OPTIMISERS: dict[str, Optimiser] = {
    "adamw": Optimiser("torch.optim:AdamW"),
    "adamw_fused": Optimiser("torch.optim:AdamW", options={"fused": True}),
    "sgd": Optimiser("torch.optim:SGD", takes=("momentum",), moments=1),
    "adafactor": Optimiser("torch.optim:Adafactor", takes=(), moments=0.01),
    "adamw_8bit": Optimiser("bitsandbytes.optim:AdamW8bit", moments=0.5),
    "adamw_paged": Optimiser("bitsandbytes.optim:PagedAdamW", paged=True),
    "adamw_paged_8bit": Optimiser("bitsandbytes.optim:PagedAdamW8bit", moments=0.5, paged=True),
    "lion_8bit": Optimiser("bitsandbytes.optim:Lion8bit", moments=0.25),
}


def build_optimiser(
    kind: str, groups: Sequence[Mapping[str, Any]], *, learning_rate: float, **keys: Any
) -> torch.optim.Optimizer:
    """The optimiser of this name over groups of parameters, which may have a rate and a weight decay of their own.

    keys: those of a recipe's `optimiser` (`betas`, `momentum`); an optimiser takes what it has.
    """
    chosen = OPTIMISERS[kind]
    module, _, name = chosen.path.partition(":")
    given = {key: keys[key] for key in chosen.takes}
    return getattr(import_module(module), name)(list(groups), lr=learning_rate, **given, **chosen.options)


def why_not(kind: str, *, cuda: bool, sharded: bool) -> str | None:
    """Why this machine cannot run an optimiser; None if it can. sharded: the weights are spread over processes (FSDP2)."""
    chosen = OPTIMISERS[kind]
    if find_spec(chosen.library) is None:
        return f"{kind} is an optimiser of {chosen.library}, which is not installed; pip install {chosen.library}, or take adamw"
    if chosen.paged and not cuda:
        return f"{kind} pages its states between GPU and host, and there is no GPU here; take adamw or adamw_8bit"
    if chosen.library == "bitsandbytes" and sharded:
        return f"{kind} does not take weights that FSDP2 spreads over processes; take adamw"
    return None
