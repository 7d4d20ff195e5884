"""Fewer visual tokens: pooling, pixel shuffle, LDP-style and query resampling between a vision encoder and LLaVA's matrices.

LLaVA's layout has a place for two matrices and none for a change of the token count. So encoder and reducer together are a
registered vision encoder, which saves and loads like any other (after `import mmkd.towers.encoders`); the matrices follow.
What a reducer trains belongs to the part "projector".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmkd.errors import TowerError

HEADS = 8  # at most, of the resampler's attention


class AveragePool(nn.Module):
    """Means of squares of factor x factor tokens. [n, N, D] -> [n, N / factor**2, D]"""

    def __init__(self, width: int, factor: int, queries: int):
        super().__init__()
        self.factor, self.width = factor, width

    def forward(self, features: Tensor) -> Tensor:
        return F.avg_pool2d(_grid(features, self.factor), self.factor).flatten(2).transpose(1, 2)


class PixelShuffle(nn.Module):
    """Squares of factor x factor tokens side by side (InternVL, Idefics3). [n, N, D] -> [n, N / factor**2, D factor**2]"""

    def __init__(self, width: int, factor: int, queries: int):
        super().__init__()
        self.factor, self.width = factor, width * factor**2

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_unshuffle(_grid(features, self.factor), self.factor).flatten(2).transpose(1, 2)


class Ldp(nn.Module):
    """Average pooling and a depthwise convolution beside it, in the style of MobileVLM V2's LDP (arXiv 2402.03766).

    There the matrices come first; here they are LLaVA's and follow. [n, N, D] -> [n, N / factor**2, D]
    """

    def __init__(self, width: int, factor: int, queries: int):
        super().__init__()
        self.factor, self.width = factor, width
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        pooled = F.avg_pool2d(_grid(features, self.factor), self.factor)  # [n, D, h, w]
        return (pooled + self.position(pooled)).flatten(2).transpose(1, 2)


class Resampler(nn.Module):
    """Learned queries that look at all features by one layer of cross-attention, as in Qwen-VL (arXiv 2308.12966).

    [n, N, D] -> [n, queries, D]; N may be anything.
    """

    def __init__(self, width: int, factor: int, queries: int):
        super().__init__()
        self.width = width
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, math.gcd(width, HEADS), batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        seen = self.norm(features)
        queries = self.queries.expand(len(features), -1, -1)
        return self.norm_out(queries + self.attention(queries, seen, seen, need_weights=False)[0])


REDUCERS: dict[str, type[nn.Module]] = {
    "average_pool": AveragePool,
    "pixel_shuffle": PixelShuffle,
    "ldp": Ldp,
    "resampler": Resampler,
}


def _grid(features: Tensor, factor: int) -> Tensor:
    """[n, side * side, D] -> [n, D, side, side]. Raises TowerError where the tokens are no square that `factor` divides."""
    count, side = features.shape[1], math.isqrt(features.shape[1])
    if side**2 != count or side % factor:
        raise TowerError(
            f"{count} features are no square whose side {factor} divides, so they cannot be brought together; choose another "
            "image size or factor, or `projector: resampler`, which takes any number"
        )
    return features.transpose(1, 2).unflatten(2, (side, side))


class ReducedEncoderConfig(PreTrainedConfig):
    """encoder: the configuration beneath.  reducer: a name of REDUCERS.  factor: side of the squares.  queries: of the resampler.

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
        feature_layer: int = -1,
        prefix: int = 0,
        image_size: list[int] | tuple[int, int] = (224, 224),
        hidden_size: int = 0,
        **kwargs: Any,
    ):
        self.reducer = reducer
        self.factor = factor
        self.queries = queries
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
        if config.reducer not in REDUCERS:
            raise TowerError(f"the reducer {config.reducer!r} is not one of {', '.join(REDUCERS)}")
        self.encoder = encoder if encoder is not None else AutoModel.from_config(config.encoder)
        self.reducer = REDUCERS[config.reducer](config.encoder.hidden_size, config.factor, config.queries)
        config.hidden_size = self.reducer.width
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Encoder and reducer have initialised themselves by their own rules."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """pixels [n, 3, H, W] -> features [n, M, D], as `last_hidden_state` and as the only hidden state; pooled: their mean."""
        states = self.encoder(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        features = self.reducer(states[self.config.feature_layer][:, self.config.prefix :])
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,), pooler_output=features.mean(1))


AutoConfig.register(ReducedEncoderConfig.model_type, ReducedEncoderConfig)
AutoModel.register(ReducedEncoderConfig, ReducedEncoder)
