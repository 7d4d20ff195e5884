"""Upcycling: a dense student becomes a sparse one whose experts are copies of its own feed-forward layers.

The result is a plain transformers model (the same image-text class around Qwen2-MoE, Qwen3-MoE or Mixtral) that saves, loads
and serves without mmkd. Before training it computes what the dense one computes: all experts of a layer are equal and the
weights of those chosen add up to one. Source: sparse upcycling (arXiv 2212.05055) as LLaVA-MoD uses it (arXiv 2408.15881).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmkd.errors import TowerError
from mmkd.towers.experts import recorded_routing, sparse_blocks
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

Layers = Literal["every-other", "all"] | Sequence[int]

PROBE = (2, 32)  # sequences and tokens of the text on which dense and sparse outputs are compared
# Largest relative difference that rounding explains; in half precisions the two weights no longer add up to one.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Target:
    """The sparse text model that holds a dense one, and what its configuration must say."""

    model_type: str
    experts: str  # its key for the number of experts
    width: str  # its key for the width of one expert
    dense_layers: bool  # whether some layers may stay dense
    fixed: dict[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()  # switches of the dense model that it has no place for


# Without norm_topk_prob the weights of the chosen experts would not add up to one.
_QWEN = {"norm_topk_prob": True, "decoder_sparse_step": 1}
TARGETS = {
    # A shared expert of width 0 is the method's "no residual expert": it adds exactly nothing, always.
    "qwen2": _Target("qwen2_moe", "num_experts", "moe_intermediate_size", True, {**_QWEN, "shared_expert_intermediate_size": 0}),
    "qwen3": _Target("qwen3_moe", "num_experts", "moe_intermediate_size", True, _QWEN),
    "llama": _Target("mixtral", "num_local_experts", "intermediate_size", False, lacks=("attention_bias", "mlp_bias")),
    "mistral": _Target("mixtral", "num_local_experts", "intermediate_size", False),
}


@dataclass(frozen=True)
class Receipt:
    """What upcycling made of a dense tower."""

    source: str  # model_type of the dense language model
    target: str  # and of the sparse one
    layers: list[int]  # that hold experts now
    experts: int  # of each of these layers
    top_k: int  # experts that one token meets
    parameters_dense: int  # of the whole tower before
    parameters_total: int  # and after
    parameters_active: int  # of these, what one token meets
    relative_difference: float  # |sparse - dense| / |dense| of the last hidden states, before training
    use: dict[int, list[float]]  # share of places that each expert gets from the fresh router, by layer

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"use": {str(layer): shares for layer, shares in self.use.items()}}

    def lines(self) -> list[str]:
        """The receipt in words."""
        shares = [share for layer in self.use.values() for share in layer]
        return [
            f"upcycled {self.source} to {self.target}: {self.experts} experts, {self.top_k} a token, in "
            f"layers {', '.join(map(str, self.layers))}",
            f"parameters: {self.parameters_dense:,} dense, {self.parameters_total:,} sparse, "
            f"{self.parameters_active:,} active a token",
            f"output difference before training: {self.relative_difference:.1e} (relative)",
            f"fresh routers give an expert {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the places "
            f"(even: {100 / self.experts:.0f} %), on {PROBE[0] * PROBE[1]} random tokens",
        ]


def upcycle(
    tower: Tower, *, experts: int = 4, top_k: int = 2, layers: Layers = "every-other", seed: int = 0
) -> tuple[Tower, Receipt]:
    """A sparse tower from a dense one, and its receipt; the dense tower is left as it is.

    experts: copies of each chosen feed-forward layer.  top_k: how many of them a token meets.
    layers: "every-other" (0, 2, 4, ..., as in LLaVA-MoD), "all", or their numbers.
    seed: of the routers, drawn as a fresh `nn.Linear` without bias draws its matrix (the released code's choice).

    Weights, processor, dtype and device stay those of the dense tower. As long as the experts are equal, no term but the load
    balance has a gradient to the routers; the experts part because each learns from other tokens. With top_k 1 the one weight is
    always 1, and the routers learn from the balance alone. Raises TowerError for a language model without a sparse kin, for
    what that kin cannot express, and when the outputs differ by more than rounding.
    """
    config = sparse_config(tower.model.config.get_text_config(), experts=experts, top_k=top_k, layers=layers)
    if top_k == 1:
        logger.warning("top_k is 1: the weight of the one expert is always 1, so the router learns from the load balance alone")
    sparse = Tower(_model(tower, config), tower.processor, max_length=tower.max_length)
    _fill(sparse, tower, seed)
    return sparse, _receipt(sparse, tower, config)


def sparse_config(text: PreTrainedConfig, *, experts: int, top_k: int, layers: Layers) -> PreTrainedConfig:
    """The sparse configuration of a dense text configuration. Raises TowerError when there is none."""
    target = TARGETS.get(text.model_type)
    if target is None:
        raise TowerError(
            f"a language model of type {text.model_type!r} cannot be upcycled; supported: "
            + ", ".join(f"{dense} (to {t.model_type})" for dense, t in TARGETS.items())
        )
    if experts < 2 or not 1 <= top_k <= experts:
        raise TowerError(f"{experts} experts with {top_k} a token: there must be at least 2, and 1 to {experts} a token")
    chosen = chosen_layers(layers, text.num_hidden_layers)
    _check_expressible(text, target, chosen)
    known = CONFIG_MAPPING[target.model_type]
    kept = {key: value for key, value in text.to_dict().items() if key in _keys(known)}
    sizes = {target.experts: experts, "num_experts_per_tok": top_k, target.width: text.intermediate_size}
    if target.dense_layers:
        sizes["mlp_only_layers"] = [layer for layer in range(text.num_hidden_layers) if layer not in chosen]
    return known(**kept | sizes | target.fixed)


def chosen_layers(layers: Layers, depth: int) -> list[int]:
    """Numbers of the layers that get experts, in order. Raises TowerError for numbers that do not exist."""
    if isinstance(layers, str):
        if layers not in ("every-other", "all"):
            raise TowerError(f"layers is {layers!r}; choose every-other, all, or a list of layer numbers")
        return list(range(0, depth, 2 if layers == "every-other" else 1))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise TowerError(f"layers {list(layers)} must be different numbers from 0 to {depth - 1}, at least one")
    return sorted(layers)


def _check_expressible(text: PreTrainedConfig, target: _Target, chosen: list[int]) -> None:
    if not target.dense_layers and len(chosen) < text.num_hidden_layers:
        raise TowerError(
            f"{target.model_type}, the sparse kin of {text.model_type}, has experts in every layer, but only layers "
            f"{', '.join(map(str, chosen))} of {text.num_hidden_layers} were asked for; set layers to all, or use a student "
            "with a language model of type qwen2 or qwen3"
        )
    switched_on = [name for name in target.lacks if getattr(text, name)]
    if switched_on:
        raise TowerError(f"{target.model_type} has no place for {', '.join(switched_on)}, which this {text.model_type} uses")
    # Qwen3-MoE knows one window for all layers, Qwen3 one for some of them.
    if text.model_type == "qwen3" and text.use_sliding_window and set(text.layer_types) != {"sliding_attention"}:
        raise TowerError("this qwen3 has windowed attention in some of its layers only, which qwen3_moe cannot express")


def _keys(known: type[PreTrainedConfig]) -> set[str]:
    """Keys of a configuration that describe its model, with `head_dim`, which every family reads and few list."""
    default = known()
    about = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    return {*default.to_dict(), *default.attribute_map, "head_dim"} - about


# ---- weights ---------------------------------------------------------------------------------------------------------


def _model(tower: Tower, text: PreTrainedConfig) -> nn.Module:
    """A model of the tower's own class around the sparse text model; weights not yet filled."""
    config = copy.deepcopy(tower.model.config)
    config.text_config = text
    with torch.random.fork_rng(devices=[]):  # the weights it draws are all replaced
        model = AutoModelForImageTextToText.from_config(config, dtype=tower.model.dtype)
    model.generation_config = copy.deepcopy(tower.model.generation_config)
    return model.to(tower.device).train(tower.model.training)


@torch.no_grad()
def _fill(sparse: Tower, dense: Tower, seed: int) -> None:
    """Copies what both have, fills experts with the dense layers, draws the routers."""
    blocks = sparse_blocks(sparse)
    inside = [f"{name}." for name, module in sparse.model.named_modules() if module in set(blocks.values())]
    old = _outside(dense.model.state_dict().items(), inside)
    new = _outside(sparse.model.state_dict().items(), inside)
    if old.keys() != new.keys():
        differing = sorted(old.keys() ^ new.keys())
        raise TowerError(f"dense and sparse model do not hold the same weights outside their experts: {', '.join(differing[:4])}")
    for name, tensor in new.items():
        tensor.copy_(old[name])
    generator = torch.Generator().manual_seed(seed)
    for layer, block in blocks.items():
        _fill_block(block, dense.language.layers[layer].mlp, generator)


def _outside(state: Iterable[tuple[str, Tensor]], prefixes: list[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state if not name.startswith(tuple(prefixes))}


def _fill_block(block: nn.Module, mlp: nn.Module, generator: torch.Generator) -> None:
    block.experts.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(block.experts.gate_up_proj))
    block.experts.down_proj.copy_(mlp.down_proj.weight.expand_as(block.experts.down_proj))
    router = block.gate.weight  # [E, D]
    bound = router.shape[1] ** -0.5
    router.copy_(torch.empty(router.shape).uniform_(-bound, bound, generator=generator))
    if "shared_expert_gate" in dict(block.named_children()):
        block.shared_expert_gate.weight.zero_()  # of the shared expert of width 0


# ---- receipt ---------------------------------------------------------------------------------------------------------


def _receipt(sparse: Tower, dense: Tower, text: PreTrainedConfig) -> Receipt:
    with recorded_routing(sparse) as routing:
        own = _probe(sparse)
    other = _probe(dense)
    source = dense.model.config.get_text_config().model_type
    difference = float((own - other).norm() / other.norm())
    if not difference <= TOLERANCE[sparse.model.dtype]:
        raise TowerError(
            f"the upcycled {text.model_type} gives other outputs than its {source}: relative difference {difference:.1e}, "
            f"more than rounding; the dense configuration says something that {text.model_type} cannot express"
        )
    use = {}
    for layer, found in routing.items():
        places = found.tokens(torch.ones_like(found.chosen[:, 0], dtype=torch.bool))
        use[layer] = (places / places.sum()).tolist()
    counts = sparse.parameter_count()
    return Receipt(
        source=source,
        target=text.model_type,
        layers=list(use),
        experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        parameters_dense=dense.parameter_count()["total"],
        parameters_total=counts["total"],
        parameters_active=counts["active"],
        relative_difference=difference,
        use=use,
    )


@torch.no_grad()
def _probe(tower: Tower) -> Tensor:
    """Last hidden states of a random text, the same for both towers. [2, 32, D] in float64"""
    known = torch.tensor(sorted(set(tower.tokenizer.get_vocab().values()) - {tower.image_token_id}))
    ids = known[torch.randint(len(known), PROBE, generator=torch.Generator().manual_seed(0))].to(tower.device)
    with evaluating(tower.model):
        hidden = tower.base(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    return hidden.double().cpu()
