"""Activation checkpointing of a student: layers keep their inputs alone and are computed again on the way back."""

from __future__ import annotations

import logging

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmkd.errors import TowerError
from mmkd.towers.recompute import recompute_layers
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)


def checkpoint_layers(student: Tower) -> None:
    """Turns checkpointing on in the parts of a student that are trained, whatever its encoder; says which cannot have it.

    Raises TowerError where no part has layers that can be checkpointed.
    """
    model = student.model
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers also makes the outputs of all embeddings require gradients, which reentrant checkpoints need. These are
        # not, and it keeps activations of frozen layers and fails on embeddings that give tuples (FocalNet, Swin).
        model.disable_input_require_grads()
        layers = True
    except ValueError:  # it allows none
        layers = False
    backbone = hasattr(student.vision, "checkpoint_backbone") and student.vision.checkpoint_backbone()
    if not any(p.requires_grad for p in student.language.parameters()) and layers:
        recompute_layers(student)  # frozen, it stays in evaluation mode, where transformers checkpoints nothing
    without = [
        f"the {part} ({type(module).__name__})"
        for part, module, has in (("vision encoder", student.vision, backbone), ("language model", student.language, False))
        if _trained(module) and not has and not (layers and _has_layers(module))
    ]
    if len(without) == 2 or not (layers or backbone):
        raise TowerError(f"gradient_checkpointing: {' and '.join(without)} have no layers that allow it; take it out")
    if without:
        logger.info("gradient_checkpointing: %s has no layers that allow it and keeps its activations", without[0])


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
