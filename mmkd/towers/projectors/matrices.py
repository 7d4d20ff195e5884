"""Projectors of LLaVA's two matrices alone."""

from __future__ import annotations

from mmkd.registry import register
from mmkd.towers.projectors.projector import Matrices


@register("projectors", "mlp")
class Mlp(Matrices):
    """Two matrices with GELU between them, one visual token a feature (LLaVA-1.5)."""


@register("projectors", "linear")
class Linear(Matrices):
    """Two matrices with nothing between them, one visual token a feature."""

    activation = "linear"
