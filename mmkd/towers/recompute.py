"""Activation checkpointing that works in evaluation mode too: for frozen language models with a gradient through them.

transformers checkpoints its layers only where they are in training mode. A frozen teacher never is, since that would switch its
dropout on; yet the visual switch keeps its activations for the way back to the student's encoder. Here each decoder layer is run
under `torch.utils.checkpoint` whatever its mode, so that of a layer only its input is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmkd.errors import TowerError
from mmkd.towers.tower import Tower


def recompute_layers(tower: Tower) -> int:
    """Makes the layers of the tower's language model compute their activations again in backward; returns how many.

    In place, and for the life of the model. Values, gradients and modes stay what they are; without gradients nothing
    happens. It costs a further forward pass of each layer in backward. Only for a language model without dropout or in
    evaluation mode: the state of the random generators is not kept. Raises TowerError where no layers are found.
    """
    layers = _outermost(tower.language)
    if not layers:
        raise TowerError(
            f"{type(tower.language).__name__} has no layers that transformers could checkpoint, so gradient_checkpointing has "
            "nothing to act on; take it out"
        )
    for layer in layers:
        # An attribute of the instance, so that hooks of the layer stay outside and run once.
        layer.forward = partial(_recomputed, layer.forward)
    return len(layers)


def _outermost(module: nn.Module) -> list[nn.Module]:
    """The layers below a module that lie in no other layer."""
    found = []
    for child in module.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else _outermost(child)
    return found


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
