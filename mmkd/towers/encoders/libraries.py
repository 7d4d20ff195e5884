"""Backbones of timm and open_clip, which are imported where one is built."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from mmkd.errors import TowerError

Statistics = tuple[list[float], list[float]]  # (mean, standard deviation) of the pixels, by colour


class TimmFeatures(nn.Module):
    """A timm model without its classifier. With `pretrained` timm's weights are loaded."""

    def __init__(self, architecture: str, arguments: dict[str, Any], pretrained: bool):
        super().__init__()
        import timm

        try:
            self.model = timm.create_model(architecture, pretrained=pretrained, num_classes=0, **arguments)
        except (RuntimeError, TypeError) as error:
            if timm.is_model(architecture.partition(".")[0]):
                raise TowerError(f"timm cannot build {architecture!r} with {arguments}: {error}") from error
            close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            raise TowerError(f"timm has no {architecture!r}; close: {', '.join(close) or 'none'}") from error
        self.statistics = _statistics(getattr(self.model, "pretrained_cfg", None) or {})

    def forward(self, pixels: Tensor) -> Tensor:
        return _timm_features(self.model, pixels)


def _timm_features(model: nn.Module, pixels: Tensor) -> Tensor:
    features = model.forward_features(pixels)
    if features.dim() == 4 and features.shape[-1] == model.num_features != features.shape[1]:
        return features.permute(0, 3, 1, 2)  # Swin-like models keep channels last
    return features


class OpenClipFeatures(nn.Module):
    """The visual half of an open_clip model, giving patch tokens instead of the pooled embedding.

    With `pretrained` the weights of the tag `arguments["pretrained"]` are loaded.
    """

    def __init__(self, architecture: str, arguments: dict[str, Any], pretrained: bool):
        super().__init__()
        import open_clip

        rest = dict(arguments)
        tag = rest.pop("pretrained", None)
        if architecture not in open_clip.list_models():
            close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
            raise TowerError(f"open_clip has no {architecture!r}; close: {', '.join(close) or 'none'}")
        try:
            weights = tag if pretrained else None
            model = open_clip.create_model(architecture, pretrained=weights, load_weights=pretrained, **rest)
        except (RuntimeError, TypeError) as error:
            raise TowerError(f"open_clip cannot build {architecture!r} with {arguments}: {error}") from error
        self.model = model.visual
        self.statistics = _statistics(getattr(self.model, "preprocess_cfg", None) or {})

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "trunk"):  # open_clip's timm towers
            return _timm_features(self.model.trunk, pixels)
        return self.model.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", normalize_intermediates=True
        )["image_intermediates"][0]


def _statistics(config: dict[str, Any]) -> Statistics | None:
    """(mean, standard deviation) of the pixels that pretrained weights expect, where their source says so."""
    return (list(config["mean"]), list(config["std"])) if "mean" in config and "std" in config else None
