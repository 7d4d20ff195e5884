"""A convolutional encoder for towers from random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.registry import register

CONV_NORMS: dict[str, Callable[[int], nn.Module]] = {"group": lambda width: nn.GroupNorm(4, width), "batch": nn.BatchNorm2d}


@register("encoders", "conv")
class ConvEncoder(nn.Module):
    """A small convolutional encoder for towers from random weights; each stage halves the picture.

    From a few thousand pictures it learns shapes and letters in a fraction of the steps that a ViT needs.
    pixels [n, 3, H, W] -> [n, widths[-1], H / 2**stages, W / 2**stages]

    norm: "group" (no picture depends on the others of its batch) or "batch" (learns faster from scratch; several processes
    each have their own statistics).
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), norm: str = "group"):
        super().__init__()
        if norm not in CONV_NORMS:
            raise TowerError(f"the norm {norm!r} of a conv encoder is not one of {', '.join(CONV_NORMS)}")
        layers: list[nn.Module] = []
        for narrow, wide in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), CONV_NORMS[norm](wide), nn.GELU()]
            layers += [nn.Conv2d(wide, wide, 3, padding=1), CONV_NORMS[norm](wide), nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)
