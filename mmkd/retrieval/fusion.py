"""A cross-encoder on a dual encoder: text tokens attend to the picture's, and a head corrects the product of the embeddings.

Any vision and text encoder can stand in it. It starts as its own dual encoder (the correction is zero at first), so it needs no
pretraining to rank as well as that one; a joint transformer from random weights learns nothing from a thousand pictures.
The design is ours; its parts are ALBEF's (arXiv 2107.07651): unimodal embeddings, cross-attention, a matching head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, VisionTextDualEncoderModel


class FusionConfig(PreTrainedConfig):
    """dual: the configuration of the dual encoder beneath.  heads: of the cross-attention.  dropout: in the correction."""

    model_type = "mmkd_fusion"
    sub_configs: ClassVar[dict[str, Any]] = {"dual": AutoConfig}

    def __init__(
        self, dual: dict[str, Any] | PreTrainedConfig | None = None, heads: int = 4, dropout: float = 0.1, **kwargs: Any
    ):
        if isinstance(dual, dict):
            dual = AutoConfig.for_model(**dual)
        self.heads = heads
        self.dropout = dropout
        super().__init__(**kwargs)
        self.dual = dual  # last: `super().__init__` would reset what was chosen for it, such as its attention


class FusionModel(PreTrainedModel):
    """`see` and `read` encode pictures and texts once; `forward` gives the log-odds that they match."""

    config_class = FusionConfig
    base_model_prefix = "fusion"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: FusionConfig, dual: VisionTextDualEncoderModel | None = None):
        super().__init__(config)
        self.dual = dual if dual is not None else AutoModel.from_config(config.dual)
        width, narrow = config.dual.projection_dim, config.dual.text_config.hidden_size
        self.picture_states = nn.Linear(config.dual.vision_config.hidden_size, width)
        self.text_states = nn.Sequential(nn.Linear(narrow, width), nn.LayerNorm(width))
        self.attention = nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.correction = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, 1))
        self.bias = nn.Parameter(torch.zeros(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation is kept but for the correction, which starts at zero."""
        if module is self.correction[-1]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def see(self, pixel_values: Tensor) -> Tensor:
        """Pixels [n, 3, H, W] -> the pooled output and the states of the vision encoder. [n, 1 + N, Dv]"""
        seen = self.dual.vision_model(pixel_values=pixel_values, return_dict=True)
        return torch.cat([seen.pooler_output[:, None], seen.last_hidden_state], 1)

    def read(self, tokens: dict[str, Tensor]) -> Tensor:
        """Token ids and mask [n, L] -> the pooled output and the states of the text encoder. [n, 1 + L, Dt]"""
        read = self.dual.text_model(**tokens, return_dict=True)
        return torch.cat([read.pooler_output[:, None], read.last_hidden_state], 1)

    def embed_pictures(self, seen: Tensor) -> Tensor:
        """[n, 1 + N, Dv] -> unit vectors [n, D]"""
        return F.normalize(self.dual.visual_projection(seen[:, 0]), dim=-1)

    def embed_texts(self, read: Tensor) -> Tensor:
        """[n, 1 + L, Dt] -> unit vectors [n, D]"""
        return F.normalize(self.dual.text_projection(read[:, 0]), dim=-1)

    def forward(self, seen: Tensor, read: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds that picture i (`seen`) and text i (`read`, its mask [P, L]) match. [P]"""
        product = self.embed_pictures(seen) * self.embed_texts(read)  # [P, D]
        pictures, texts = self.picture_states(seen[:, 1:]), self.text_states(read[:, 1:])  # [P, N, D], [P, L, D]
        found = self.norm(texts + self.attention(texts, pictures, pictures, need_weights=False)[0])  # [P, L, D]
        found = _mean(found, attention_mask)  # [P, D]
        facts = torch.cat([found, product * product.shape[-1] ** 0.5, found * pictures.mean(1)], -1)  # [P, 3 D]
        return self.dual.logit_scale.exp() * product.sum(-1) + self.bias + self.correction(facts)[:, 0]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each text. [P, L, D], [P, L] -> [P, D]"""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


AutoConfig.register(FusionConfig.model_type, FusionConfig)
AutoModel.register(FusionConfig, FusionModel)
