"""Puts a dual encoder together from any vision encoder and any text encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.retrieval.dual_encoders import TransformersDual
from mmkd.towers.assemble import VisionSpec, build_encoder, image_size, load_tokenizer, model_from_config, pixel_statistics
from mmkd.towers.whole import load_whole


@dataclass
class TextSpec:
    """Where a text encoder comes from: `source` (a folder or hub id) or `config` (random weights) with its `model_type`.

    pooling: the encoder's own pooled output, or the "mean" of its last states, as sentence encoders are pooled.
    frozen: its weights are not trained; goes with the mean.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    pooling: Literal["own", "mean"] = "own"
    frozen: bool = False


def assemble_dual(
    vision: VisionSpec,
    text: TextSpec,
    *,
    embedding: int = 256,
    tokenizer: Any = None,
    temperature: float = 0.07,
    seed: int = 0,
) -> TransformersDual:
    """A dual encoder from any vision encoder and a text encoder, each behind a linear projection of its pooled output.

    A plain `VisionTextDualEncoderModel`; parts without pretrained weights and the projections are drawn from `seed`.
    `tokenizer` is needed for a text encoder made from a configuration (`train_text_tokenizer`). Raises TowerError when a part
    cannot be found or gives no pooled output.
    """
    from transformers import (
        CLIPImageProcessor,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
    )

    if text.source is not None:
        tokenizer = load_tokenizer(text.source)
    if tokenizer is None:
        raise TowerError("a text encoder from a configuration needs a tokenizer; train one on the captions")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(vision)
        height, width = image_size(vision, encoder)
        encoder.config.hidden_size = _pooled_width(encoder, pixel_values=torch.zeros(1, 3, height, width))
        text_encoder = build_text_encoder(text, tokenizer)
        _pooled_width(text_encoder, **tokenizer(["a"], return_tensors="pt"))
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            encoder.config, text_encoder.config, projection_dim=embedding, logit_scale_init_value=-math.log(temperature)
        )
        model = VisionTextDualEncoderModel(config=config)  # built whole, as `from_pretrained` builds it
    model.vision_model.load_state_dict(encoder.state_dict())
    model.text_model.load_state_dict(text_encoder.state_dict())
    mean, std = pixel_statistics(vision, encoder)
    pictures = CLIPImageProcessor(size={"height": height, "width": width}, do_center_crop=False, image_mean=mean, image_std=std)
    return TransformersDual(model, VisionTextDualEncoderProcessor(pictures, tokenizer))


def build_text_encoder(spec: TextSpec, tokenizer: Any) -> nn.Module:
    """The text encoder of a spec; the vocabulary and special tokens of one from a configuration are its tokenizer's."""
    from mmkd.retrieval.text_encoders import SentenceConfig, SentenceEncoder

    if spec.frozen and spec.pooling == "own":
        raise TowerError("a frozen text encoder is pooled by the mean of its states; set its pooling to mean")
    if spec.pooling == "mean":
        encoder = _text_encoder(spec, tokenizer)
        return SentenceEncoder(SentenceConfig(encoder.config, frozen=spec.frozen), encoder)
    return _text_encoder(spec, tokenizer)


def _text_encoder(spec: TextSpec, tokenizer: Any) -> nn.Module:
    from transformers import AutoModel

    if (spec.source is None) == (spec.config is None):
        raise TowerError("a text encoder needs either `source` (pretrained) or `config` (random weights)")
    if spec.source is not None:
        model = load_whole(AutoModel, spec.source, "text encoder", part=True, pooled=spec.pooling == "own")
        return getattr(model, "text_model", model)
    config = dict(spec.config or {})
    kind = config.pop("model_type", None)
    if kind is None:
        raise TowerError("the text `config` lacks `model_type` (for example bert, clip_text_model)")
    return model_from_config(AutoModel, kind, text_defaults(tokenizer) | config, "text")


def text_defaults(tokenizer: Any) -> dict[str, Any]:
    """Keys of a text configuration that its tokenizer decides."""
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


def _pooled_width(encoder: nn.Module, **inputs: Tensor) -> int:
    """Width of an encoder's pooled output. Raises TowerError when it has none or does not take the input."""
    try:
        with torch.no_grad():
            pooled = getattr(encoder.eval()(**inputs, return_dict=True), "pooler_output", None)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise TowerError(f"{type(encoder).__name__} does not take its own kind of input: {error}") from error
    if pooled is None or pooled.dim() != 2:
        raise TowerError(
            f"{type(encoder).__name__} gives no pooled output, which a dual encoder projects; use an encoder with one "
            "(vit, clip_vision_model, dinov2, focalnet, mmkd_encoder; bert, clip_text_model, mmkd_bag_of_words)"
        )
    return pooled.shape[-1]
