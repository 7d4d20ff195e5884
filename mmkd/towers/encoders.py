"""Vision encoders that transformers does not know, as registered models: timm, open_clip, and your own.

A transformers encoder needs none of this. The others are wrapped in one `PreTrainedModel`, so that a student built on
them saves and loads like any other (after `import mmkd.towers.encoders`). The wrapper asks one thing of a backbone:
pixels [n, 3, H, W] in, vision features [n, N, Dv] out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

ENTRY_POINT_GROUP = "mmkd.encoders"
_REGISTERED: dict[str, Callable[..., nn.Module]] = {}


def register_encoder(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: makes a module class (or a function that builds one) known as the encoder `name`.

    The module maps pixels [n, 3, H, W] to vision features [n, N, Dv] or to a feature map [n, Dv, h, w].
    Keyword arguments of the recipe's `arguments:` are handed to it.
    """

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        known = _REGISTERED.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (build.__module__, build.__qualname__):
            raise ValueError(f"the encoder name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _REGISTERED[name] = build
        return build

    return register


def find_encoder(name: str, module: str | None = None) -> Callable[..., nn.Module]:
    """The builder registered as `name`, in this process, by `module` (imported) or by an entry point."""
    if name not in _REGISTERED and module:
        import_module(module)
    if name not in _REGISTERED:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                register_encoder(name)(point.load())
    if name not in _REGISTERED:
        names = sorted({*_REGISTERED, *(p.name for p in entry_points(group=ENTRY_POINT_GROUP))})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"registered: {', '.join(names) or 'none'}"
        raise ValueError(f"no encoder is registered as {name!r}; {hint} Import the module that registers it first")
    return _REGISTERED[name]


class EncoderConfig(PreTrainedConfig):
    """Configuration of a wrapped encoder.

    source: "timm", "open_clip" or "module" (registered with `register_encoder`).
    architecture: the name the source knows it by.  arguments: passed to the source's builder.
    image_size: (height, width) in pixels.  hidden_size: feature width Dv, found when the encoder is built.
    """

    model_type = "mmkd_encoder"

    def __init__(
        self,
        source: str = "module",
        architecture: str = "",
        arguments: dict[str, Any] | None = None,
        module: str | None = None,
        image_size: list[int] | tuple[int, int] = (224, 224),
        hidden_size: int = 0,
        **kwargs: Any,
    ):
        self.source = source
        self.architecture = architecture
        self.arguments = dict(arguments or {})
        self.module = module
        self.image_size = list(image_size)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class WrappedEncoder(PreTrainedModel):
    """A backbone of timm, open_clip or the user's own behind transformers' vision-encoder interface."""

    config_class = EncoderConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"
    _no_split_modules: list[str] = []

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone has initialised itself by its own rules."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """pixels [n, 3, H, W] -> features [n, N, Dv], as `last_hidden_state` and as the only hidden state."""
        features = _tokens(self.backbone(pixel_values))  # [n, N, Dv]
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


def _tokens(features: Tensor) -> Tensor:
    """A feature map [n, Dv, h, w] becomes tokens [n, h*w, Dv]; tokens stay."""
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() == 3:
        return features
    raise ValueError(f"a vision encoder must give [n, N, Dv] or [n, Dv, h, w]; this one gives {list(features.shape)}")


def build_backbone(config: EncoderConfig, pretrained: bool = False) -> nn.Module:
    """The bare backbone. With `pretrained` its source's weights are loaded (timm, open_clip)."""
    if config.source == "timm":
        return _TimmFeatures(config, pretrained)
    if config.source == "open_clip":
        return _OpenClipFeatures(config, pretrained)
    if config.source == "module":
        return find_encoder(config.architecture, config.module)(**config.arguments)
    raise ValueError(f"encoder source {config.source!r} is not one of timm, open_clip, module")


class _TimmFeatures(nn.Module):
    def __init__(self, config: EncoderConfig, pretrained: bool):
        super().__init__()
        import timm

        try:
            self.model = timm.create_model(
                config.architecture, pretrained=pretrained, num_classes=0, **config.arguments
            )
        except RuntimeError as error:
            close = difflib.get_close_matches(config.architecture, timm.list_models(), n=3)
            raise ValueError(f"timm has no {config.architecture!r}; close: {', '.join(close) or 'none'}") from error

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        if features.dim() == 4 and features.shape[-1] == self.model.num_features != features.shape[1]:
            features = features.permute(0, 3, 1, 2)  # Swin-like models keep channels last
        return features


class _OpenClipFeatures(nn.Module):
    """The visual half of an open_clip model, giving patch tokens instead of the pooled embedding."""

    def __init__(self, config: EncoderConfig, pretrained: bool):
        super().__init__()
        import open_clip

        arguments = dict(config.arguments)
        tag = arguments.pop("pretrained", None)
        if config.architecture not in open_clip.list_models():
            close = difflib.get_close_matches(config.architecture, open_clip.list_models(), n=3)
            raise ValueError(f"open_clip has no {config.architecture!r}; close: {', '.join(close) or 'none'}")
        model = open_clip.create_model(
            config.architecture, pretrained=tag if pretrained else None, load_weights=pretrained, **arguments
        )
        self.model = model.visual

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "trunk"):  # open_clip's timm towers
            return self.model.trunk.forward_features(pixels)
        return self.model.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", normalize_intermediates=True
        )["image_intermediates"][0]


@torch.no_grad()
def feature_shape(encoder: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """(N, Dv): how many features an encoder gives for one picture and how wide they are."""
    features = encoder(torch.zeros(1, 3, *image_size)).last_hidden_state
    return features.shape[1], features.shape[2]


AutoConfig.register(EncoderConfig.model_type, EncoderConfig)
AutoModel.register(EncoderConfig, WrappedEncoder)
