"""Vision encoders that transformers does not know, as registered models: timm, open_clip, and your own.

A transformers encoder needs none of this. The others are wrapped in one `PreTrainedModel`, so that a student built on
them saves and loads like any other (after `import mmkd.towers.encoders`). The wrapper asks one thing of a backbone:
pixels [n, 3, H, W] in, vision features [n, N, Dv] out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmkd.errors import TowerError

ENTRY_POINT_GROUP = "mmkd.encoders"
CONV_NORMS: dict[str, Callable[[int], nn.Module]] = {"group": lambda width: nn.GroupNorm(4, width), "batch": nn.BatchNorm2d}
_REGISTERED: dict[str, Callable[..., nn.Module]] = {}


def register_encoder(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: makes a module class (or a function that builds one) known as the encoder `name`.

    The module maps pixels [n, 3, H, W] to vision features [n, N, Dv] or to a feature map [n, Dv, h, w].
    Keyword arguments of the recipe's `arguments:` are handed to it.
    """

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        known = _REGISTERED.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (build.__module__, build.__qualname__):
            raise TowerError(f"the encoder name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _REGISTERED[name] = build
        return build

    return register


def find_encoder(name: str, module: str | None = None) -> Callable[..., nn.Module]:
    """The builder registered as `name`, in this process, by `module` (imported) or by an entry point."""
    if name not in _REGISTERED and module:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise TowerError(f"the module {module!r} of the encoder {name!r} cannot be imported: {error}") from error
    if name not in _REGISTERED:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                register_encoder(name)(point.load())
    if name not in _REGISTERED:
        names = sorted({*_REGISTERED, *(p.name for p in entry_points(group=ENTRY_POINT_GROUP))})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"registered: {', '.join(names) or 'none'}."
        raise TowerError(f"no encoder is registered as {name!r}; {hint} Import the module that registers it, or give `module`")
    return _REGISTERED[name]


@register_encoder("conv")
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
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        with torch.device("cpu"):  # `from_pretrained` builds on the meta device, where plain tensors would lose their values
            self.backbone = build_backbone(config)
        _save_all_buffers(self.backbone)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone has initialised itself by its own rules."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """pixels [n, 3, H, W] -> features [n, N, Dv], as `last_hidden_state` and as the only hidden state; pooled: their mean."""
        features = tokens_of(self.backbone(pixel_values))  # [n, N, Dv]
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,), pooler_output=features.mean(1))


def _save_all_buffers(backbone: nn.Module) -> None:
    """Makes every buffer part of the saved model: `from_pretrained` leaves those that no file holds as memory falls."""
    for module in backbone.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.clone())


def tokens_of(features: Tensor) -> Tensor:
    """A feature map [n, Dv, h, w] becomes tokens [n, h*w, Dv]; tokens stay. Raises TowerError for anything else."""
    if not isinstance(features, Tensor):
        raise TowerError(f"a vision encoder must give a tensor, [n, N, Dv] or [n, Dv, h, w], not {type(features).__name__}")
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() == 3:
        return features
    raise TowerError(f"a vision encoder must give [n, N, Dv] or [n, Dv, h, w]; this one gives {list(features.shape)}")


def build_backbone(config: EncoderConfig, pretrained: bool = False) -> nn.Module:
    """The bare backbone. With `pretrained` its source's weights are loaded (timm, open_clip)."""
    if config.source == "timm":
        return _TimmFeatures(config, pretrained)
    if config.source == "open_clip":
        return _OpenClipFeatures(config, pretrained)
    if config.source == "module":
        return find_encoder(config.architecture, config.module)(**config.arguments)
    raise TowerError(f"encoder source {config.source!r} is not one of timm, open_clip, module")


class _TimmFeatures(nn.Module):
    def __init__(self, config: EncoderConfig, pretrained: bool):
        super().__init__()
        import timm

        try:
            self.model = timm.create_model(
                config.architecture, pretrained=pretrained, num_classes=0, **config.arguments
            )
        except (RuntimeError, TypeError) as error:
            if timm.is_model(config.architecture.partition(".")[0]):
                raise TowerError(f"timm cannot build {config.architecture!r} with {config.arguments}: {error}") from error
            close = difflib.get_close_matches(config.architecture, timm.list_models(), n=3)
            raise TowerError(f"timm has no {config.architecture!r}; close: {', '.join(close) or 'none'}") from error
        self.statistics = _statistics(getattr(self.model, "pretrained_cfg", None) or {})

    def forward(self, pixels: Tensor) -> Tensor:
        return _timm_features(self.model, pixels)


def _timm_features(model: nn.Module, pixels: Tensor) -> Tensor:
    features = model.forward_features(pixels)
    if features.dim() == 4 and features.shape[-1] == model.num_features != features.shape[1]:
        return features.permute(0, 3, 1, 2)  # Swin-like models keep channels last
    return features


def _statistics(config: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """(mean, standard deviation) of the pixels that pretrained weights expect, where their source says so."""
    return (list(config["mean"]), list(config["std"])) if "mean" in config and "std" in config else None


class _OpenClipFeatures(nn.Module):
    """The visual half of an open_clip model, giving patch tokens instead of the pooled embedding."""

    def __init__(self, config: EncoderConfig, pretrained: bool):
        super().__init__()
        import open_clip

        arguments = dict(config.arguments)
        tag = arguments.pop("pretrained", None)
        if config.architecture not in open_clip.list_models():
            close = difflib.get_close_matches(config.architecture, open_clip.list_models(), n=3)
            raise TowerError(f"open_clip has no {config.architecture!r}; close: {', '.join(close) or 'none'}")
        try:
            model = open_clip.create_model(
                config.architecture, pretrained=tag if pretrained else None, load_weights=pretrained, **arguments
            )
        except (RuntimeError, TypeError) as error:
            raise TowerError(f"open_clip cannot build {config.architecture!r} with {config.arguments}: {error}") from error
        self.model = model.visual
        self.statistics = _statistics(getattr(self.model, "preprocess_cfg", None) or {})

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "trunk"):  # open_clip's timm towers
            return _timm_features(self.model.trunk, pixels)
        return self.model.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", normalize_intermediates=True
        )["image_intermediates"][0]


AutoConfig.register(EncoderConfig.model_type, EncoderConfig)
AutoModel.register(EncoderConfig, WrappedEncoder)

import mmkd.towers.reducers  # noqa: E402, F401  registers encoders with fewer tokens
