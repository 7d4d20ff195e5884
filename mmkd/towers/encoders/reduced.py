"""A vision encoder with a projector's reducing half behind it (`mmkd.towers.projectors`), as one transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmkd.registry import options_of
from mmkd.towers.plugins import find


class ReducedEncoderConfig(PreTrainedConfig):
    """encoder: the configuration beneath.  reducer: a registered projector, which `module` registers where mmkd does not.

    factor: side of the squares that become one token.  queries: of the resampler.  options: others, of a projector of one's own.
    feature_layer: which hidden state is reduced.  prefix: tokens at its head that are left out.
    """

    model_type = "mmkd_reduced_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig}

    def __init__(
        self,
        encoder: dict[str, Any] | PreTrainedConfig | None = None,
        reducer: str = "average_pool",
        factor: int = 2,
        queries: int = 64,
        options: dict[str, Any] | None = None,
        module: str | None = None,
        feature_layer: int = -1,
        prefix: int = 0,
        image_size: list[int] | tuple[int, int] = (224, 224),
        hidden_size: int = 0,
        **kwargs: Any,
    ):
        self.reducer = reducer
        self.factor = factor
        self.queries = queries
        self.options = dict(options or {})
        self.module = module
        self.feature_layer = feature_layer
        self.prefix = prefix
        self.image_size = list(image_size)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)
        # Last: the configuration's own start would undo what is chosen for it, such as its attention.
        self.encoder = AutoConfig.for_model(**encoder) if isinstance(encoder, dict) else encoder


class ReducedEncoder(PreTrainedModel):
    """A vision encoder whose features are fewer than its own."""

    config_class = ReducedEncoderConfig
    main_input_name = "pixel_values"
    base_model_prefix = "reduced"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: ReducedEncoderConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        kind = find("projectors", config.reducer, config.module)
        known = {"factor": config.factor, "queries": config.queries, **config.options}
        options = {name: known[name] for name in options_of(kind) if name in known}
        self.encoder = encoder if encoder is not None else AutoModel.from_config(config.encoder)
        self.reducer = kind(config.encoder.hidden_size, **options)
        config.hidden_size = self.reducer.width
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Encoder and reducer have initialised themselves by their own rules."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """pixels [n, 3, H, W] -> features [n, M, D], as `last_hidden_state` and as the only hidden state; pooled: their mean."""
        states = self.encoder(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        features = self.reducer(states[self.config.feature_layer][:, self.config.prefix :]).contiguous()  # vLLM's kernels ask it
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,), pooler_output=features.mean(1))


def reduced_config(encoder: PreTrainedConfig, name: str, options: Mapping[str, Any], **where: Any) -> ReducedEncoderConfig:
    """The configuration of an encoder with the registered projector `name` and its options behind it.

    The module of a projector of one's own is noted, so that whoever loads the model imports it.
    """
    module = find("projectors", name).__module__
    own = {key: value for key, value in options.items() if key not in ("factor", "queries")}
    common = {key: value for key, value in options.items() if key not in own}
    module = None if module.startswith("mmkd.") else module
    return ReducedEncoderConfig(encoder, name, **common, options=own, module=module, **where)


AutoConfig.register(ReducedEncoderConfig.model_type, ReducedEncoderConfig)
AutoModel.register(ReducedEncoderConfig, ReducedEncoder)
