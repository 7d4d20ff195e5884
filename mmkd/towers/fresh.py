"""A student's vision encoder drawn anew: what a method does where the encoder has learned nothing yet."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mmkd.errors import TowerError
from mmkd.towers.tower import Tower


def draw_vision_anew(tower: Tower, seed: int) -> None:
    """Random weights in the place of a tower's vision encoder, as its class draws them; projector and language model stay.

    Raises TowerError for an encoder that is no model of its own.
    """
    vision = tower.vision
    if not isinstance(vision, PreTrainedModel):
        raise TowerError(f"{type(vision).__name__} is no model that could be drawn anew; take `fresh` out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(vision)(vision.config)
    vision.load_state_dict(drawn.state_dict())
