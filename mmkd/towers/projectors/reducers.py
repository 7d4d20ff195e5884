"""Projectors with fewer visual tokens: pooling, pixel shuffle, LDP-style and query resampling before LLaVA's two matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import TowerError
from mmkd.registry import register
from mmkd.towers.projectors.projector import Projector

HEADS = 8  # at most, of the resampler's attention


@register("projectors", "average_pool")
class AveragePool(Projector):
    """Means of squares of factor x factor tokens. [n, N, D] -> [n, N / factor**2, D]"""

    def __init__(self, width: int, factor: int = 2):
        super().__init__()
        self.factor, self.width = factor, width

    def forward(self, features: Tensor) -> Tensor:
        return F.avg_pool2d(_grid(features, self.factor), self.factor).flatten(2).transpose(1, 2)


@register("projectors", "pixel_shuffle")
class PixelShuffle(Projector):
    """Squares of factor x factor tokens side by side (InternVL, Idefics3). [n, N, D] -> [n, N / factor**2, D factor**2]"""

    def __init__(self, width: int, factor: int = 2):
        super().__init__()
        self.factor, self.width = factor, width * factor**2

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_unshuffle(_grid(features, self.factor), self.factor).flatten(2).transpose(1, 2)


@register("projectors", "ldp")
class Ldp(Projector):
    """Average pooling and a depthwise convolution beside it, in the style of MobileVLM V2's LDP (arXiv 2402.03766).

    There the matrices come first; here they are LLaVA's and follow. [n, N, D] -> [n, N / factor**2, D]
    """

    def __init__(self, width: int, factor: int = 2):
        super().__init__()
        self.factor, self.width = factor, width
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        pooled = F.avg_pool2d(_grid(features, self.factor), self.factor)  # [n, D, h, w]
        return (pooled + self.position(pooled)).flatten(2).transpose(1, 2)


@register("projectors", "resampler")
class Resampler(Projector):
    """Learned queries that look at all features by one layer of cross-attention, as in Qwen-VL (arXiv 2308.12966).

    [n, N, D] -> [n, queries, D]; N may be anything.
    """

    def __init__(self, width: int, queries: int = 64):
        super().__init__()
        self.width = width
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, math.gcd(width, HEADS), batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        seen = self.norm(features)
        queries = self.queries.expand(len(features), -1, -1)
        return self.norm_out(queries + self.attention(queries, seen, seen, need_weights=False)[0])


def _grid(features: Tensor, factor: int) -> Tensor:
    """[n, side * side, D] -> [n, D, side, side]. Raises TowerError where the tokens are no square that `factor` divides."""
    count, side = features.shape[1], math.isqrt(features.shape[1])
    if side**2 != count or side % factor:
        raise TowerError(
            f"{count} features are no square whose side {factor} divides, so they cannot be brought together; choose another "
            "image size or factor, or `projector: resampler`, which takes any number"
        )
    return features.transpose(1, 2).unflatten(2, (side, side))
