"""Small random shifts and scalings of pictures that are prepared already, a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkd.retrieval.recipe import AugmentSpec


def augmented(inputs: dict[str, Tensor], spec: AugmentSpec | None) -> dict[str, Tensor]:
    """Prepared pictures, shifted and scaled as a recipe's `training.augment` says; unchanged without one."""
    if spec is None:
        return inputs
    return {k: shift_and_scale(v, spec.shift, spec.scale) if v.dim() == 4 else v for k, v in inputs.items()}


def shift_and_scale(pixels: Tensor, shift: float, scale: float) -> Tensor:
    """Moves each picture by up to `shift` of its sides and scales it by a factor in 1 - scale ... 1 + scale. [n, 3, H, W]

    Pixels from outside the picture repeat its border. The draws come from torch's CPU generator on every device.
    """
    count = len(pixels)
    factors = 1 + scale * (2 * torch.rand(count) - 1)  # [n]
    moves = 2 * shift * (2 * torch.rand(count, 2) - 1)  # [n, 2]; grid_sample's picture is 2 wide
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = 1 / factors
    maps[:, :, 2] = moves
    maps = maps.to(pixels.device, pixels.dtype)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
