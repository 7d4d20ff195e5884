"""Backbones of timm, open_clip or a user's own as transformers models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmkd.errors import TowerError
from mmkd.towers.encoders.libraries import OpenClipFeatures, TimmFeatures
from mmkd.towers.plugins import find

LIBRARIES = {"timm": TimmFeatures, "open_clip": OpenClipFeatures}


class EncoderConfig(PreTrainedConfig):
    """Configuration of a wrapped encoder.

    source: "timm", "open_clip" or "module" (registered as one of "encoders").
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

    def checkpoint_backbone(self) -> bool:
        """Turns on the backbone's own activation checkpointing (timm, open_clip); False where it has none."""
        for module in (getattr(self.backbone, "model", None), self.backbone):
            if module is not None and hasattr(module, "set_grad_checkpointing"):
                try:
                    module.set_grad_checkpointing(True)
                except AssertionError:  # how timm's say that they have none
                    return False
                return True
        return False

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
    if config.source in LIBRARIES:
        return LIBRARIES[config.source](config.architecture, config.arguments, pretrained)
    if config.source == "module":
        return find("encoders", config.architecture, config.module)(**config.arguments)
    raise TowerError(f"encoder source {config.source!r} is not one of {', '.join(LIBRARIES)}, module")


AutoConfig.register(EncoderConfig.model_type, EncoderConfig)
AutoModel.register(EncoderConfig, WrappedEncoder)
