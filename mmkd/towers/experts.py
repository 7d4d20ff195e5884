"""What a language model with experts tells about them: where they are, how tokens were routed, parameters a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd.towers.protocol import TowerLike

# Text models whose sparse layers hold a router `mlp.gate`, which gives (logits, weights, choices), and experts in
# `mlp.experts`. Data, not code: a further family of transformers with these names needs its model_type here.
ROUTED = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})


@dataclass
class Routing:
    """How one layer's router sent the tokens of a batch, padding included, in the order of `input_ids.flatten()`."""

    logits: Tensor  # [B * L, E], with gradient
    chosen: Tensor  # [B * L, k], experts of each token

    def tokens(self, mask: Tensor) -> Tensor:
        """Places that each expert got among the tokens of `mask` [B * L] (bool): k a token, whole numbers. [E]"""
        places = mask.long()[:, None].expand_as(self.chosen)  # [B * L, k]
        counts = torch.zeros(self.logits.shape[-1], dtype=torch.long, device=mask.device)
        return counts.scatter_add_(0, self.chosen.flatten(), places.flatten())


def sparse_blocks(tower: TowerLike) -> dict[int, nn.Module]:
    """The blocks of router and experts by layer; empty for a dense tower."""
    if tower.model.config.get_text_config().model_type not in ROUTED:
        return {}
    blocks = {index: layer.mlp for index, layer in enumerate(tower.language.layers)}
    return {index: block for index, block in blocks.items() if "experts" in dict(block.named_children())}


@contextmanager
def recorded_routing(tower: TowerLike) -> Iterator[dict[int, Routing]]:
    """Records how `tower.read` routes tokens, by layer; a second read replaces the first. Nothing for a dense tower.

    Hooks, since the image-text models around a sparse language model hand on neither its router logits nor a balance loss
    (so that the balance counts once, where a term asks for it).
    """
    routing: dict[int, Routing] = {}

    def hook(layer: int) -> torch.utils.hooks.RemovableHandle:
        def record(_module: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            routing[layer] = Routing(output[0], output[2])

        return blocks[layer].gate.register_forward_hook(record)

    blocks = sparse_blocks(tower)
    handles = [hook(layer) for layer in blocks]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def idle_parameters(tower: TowerLike) -> int:
    """Parameters that one token does not meet: those of the experts that it is not sent to."""
    idle = 0
    for block in sparse_blocks(tower).values():
        each = sum(p.numel() for p in block.experts.parameters()) // block.gate.num_experts
        idle += each * (block.gate.num_experts - block.gate.top_k)
    return idle
