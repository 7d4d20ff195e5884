"""Puts a student together: any vision encoder + a projector + any causal language model.

The result is a plain `LlavaForConditionalGeneration` with a `LlavaProcessor`: it saves, loads and serves without mmkd
(an encoder that transformers does not know needs `import mmkd.towers.encoders`).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmkd.errors import TowerError
from mmkd.registry import options_of
from mmkd.towers.encoders import EncoderConfig, ReducedEncoder, WrappedEncoder, build_backbone, reduced_config
from mmkd.towers.plugins import find
from mmkd.towers.projectors import Matrices, Projector
from mmkd.towers.templates import CHAT_TEMPLATES, IMAGE
from mmkd.towers.tower import Tower
from mmkd.towers.whole import load_beside, load_whole

logger = logging.getLogger(__name__)

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|pad|>"}
_TURNS = ["<|system|>", "<|user|>", "<|assistant|>", IMAGE]


@dataclass
class VisionSpec:
    """Where the vision encoder comes from: `source` (pretrained weights) or `config` (random weights).

    source: "hf-hub:NAME", "local-dir:PATH", "timm:NAME", "open_clip:NAME[/TAG]".
    config: a transformers vision configuration with its `model_type`, or
            {"model_type": "mmkd_encoder", "source": "timm"|"open_clip"|"module", "architecture": ..., "arguments": {...}}.
    feature_layer: which hidden state is the vision feature; -1 the last, -2 the one before (LLaVA's choice for CLIP).
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    image_size: tuple[int, int] | None = None  # (height, width)
    feature_layer: int | None = None
    mean: list[float] | None = None  # of the pixels, by colour; None: what the pretrained weights expect, else CLIP's
    std: list[float] | None = None


@dataclass
class LanguageSpec:
    """Where the language model comes from: `source` (a folder or hub id) or `config` (random weights)."""

    source: str | None = None
    config: dict[str, Any] | None = None
    chat_template: str | None = None  # a name of CHAT_TEMPLATES or a template


def assemble(
    vision: VisionSpec,
    language: LanguageSpec,
    *,
    projector: str = "mlp",
    projector_options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    max_length: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tower:
    """A LLaVA-shaped tower from its parts; parts without pretrained weights are drawn from `seed`.

    `projector`: a registered one: "mlp", "linear", or one that gives fewer tokens, with its `projector_options`.
    `tokenizer` is needed for a language model made from a configuration (the teacher's, or `train_tokenizer`).
    Raises TowerError when a part cannot be found or does not fit, with both numbers.
    """
    kind: type[Projector] = find("projectors", projector)
    options = _checked_options(projector, kind, projector_options or {})
    tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(language)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(vision)
        language_model = _build_language_model(language, tokenizer)
        _plain_head(language_model)
        features, prefix, strategy = _feature_layout(encoder, vision)
        if not issubclass(kind, Matrices):
            encoder = _reduced(encoder, vision, projector, prefix, options)
            features, prefix, strategy = _feature_layout(encoder, vision)
        config = LlavaConfig(
            vision_config=encoder.config,
            text_config=language_model.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=features,
            projector_hidden_act=kind.activation,
            vision_feature_select_strategy=strategy,
            vision_feature_layer=_feature_layer(vision, encoder),
            tie_word_embeddings=bool(language_model.config.tie_word_embeddings),
        )
        # Not `.to(dtype)`: that would round the rotary frequencies too, which a loaded model keeps in float32.
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        except AttributeError as error:
            raise TowerError(
                f"LLaVA cannot hold a {type(language_model).__name__}: {error}; use a language model of the Llama kind, such as "
                "llama, qwen2, qwen3, mistral, gemma or smollm3"
            ) from error
    _fill(model, encoder, language_model)
    model.generation_config = _generation_config(tokenizer)
    processor = _processor(vision, encoder, tokenizer, features, prefix, strategy, _chat_template(language, tokenizer))
    return Tower(model, processor, max_length=max_length)


# ---- parts -----------------------------------------------------------------------------------------------------------


def build_encoder(spec: VisionSpec) -> nn.Module:
    if (spec.source is None) == (spec.config is None):
        raise TowerError("a vision encoder needs either `source` (pretrained) or `config` (random weights)")
    if spec.source is None:
        return _encoder_from_config(dict(spec.config or {}), spec)
    kind, _, name = spec.source.partition(":")
    if kind in ("hf-hub", "local-dir"):
        model = load_whole(AutoModel, name, "vision encoder", part=True, shown=spec.source)
        return getattr(model, "vision_model", model)
    if kind in ("timm", "open_clip"):
        architecture, _, tag = name.partition("/") if kind == "open_clip" else (name, "", "")
        arguments = {"pretrained": tag} if tag else {}
        config = EncoderConfig(kind, architecture, arguments, image_size=image_size(spec))
        encoder = WrappedEncoder(config)
        encoder.backbone = build_backbone(config, pretrained=True)
        return _with_width(encoder)
    raise TowerError(
        f"vision source {spec.source!r} has no known prefix; write hf-hub:NAME, local-dir:PATH, timm:NAME or open_clip:NAME/TAG"
        + _similar_sources(spec.source)
    )


def _similar_sources(name: str) -> str:
    """Sources with a name like this one, with their prefixes, as the end of a message."""
    import open_clip
    import timm

    known = {f"timm:{model}": model for model in timm.list_models()} | {f"open_clip:{m}": m for m in open_clip.list_models()}
    bare = name.rpartition("/")[2].lower()
    close = difflib.get_close_matches(bare, [model.lower() for model in known.values()], n=3, cutoff=0.7)
    found = [source for source, model in known.items() if model.lower() in close]
    if Path(name).is_dir():
        found.insert(0, f"local-dir:{name}")
    elif "/" in name:
        found.insert(0, f"hf-hub:{name}")
    return f". Did you mean {' or '.join(found[:4])}?" if found else ""


def _encoder_from_config(config: dict[str, Any], spec: VisionSpec) -> nn.Module:
    kind = config.pop("model_type", None)
    if kind is None:
        raise TowerError("the vision `config` lacks `model_type` (for example clip_vision_model, vit, dinov2, mmkd_encoder)")
    if kind == EncoderConfig.model_type:
        _check_keys(EncoderConfig, config, "vision")
        return _with_width(WrappedEncoder(EncoderConfig(image_size=image_size(spec), **config)))
    encoder = model_from_config(AutoModel, kind, config, "vision")
    if encoder.main_input_name != "pixel_values":
        half = getattr(getattr(encoder.config, "vision_config", None), "model_type", None)
        hint = f"its vision half is {half!r}" if half else "write the model_type of a vision model"
        raise TowerError(f"{kind!r} is no vision encoder but reads {encoder.main_input_name}; {hint}")
    return encoder


def model_from_config(auto: Any, kind: str, config: dict[str, Any], what: str) -> nn.Module:
    """A model with random weights from the keys of a recipe."""
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=3)
        raise TowerError(f"transformers has no {what} model_type {kind!r}; close: {', '.join(close) or 'none'}")
    _check_keys(CONFIG_MAPPING[kind], config, what)
    try:
        return auto.from_config(AutoConfig.for_model(kind, **config))
    except (ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise TowerError(f"the {what} `config` makes no {kind}: {error}") from error


def _check_keys(kind: type[PreTrainedConfig], config: dict[str, Any], what: str) -> None:
    """transformers keeps keys that it does not know and does nothing with them; a misspelt one would go unnoticed."""
    known = {*kind().to_dict(), *kind.attribute_map}
    for key in [key for key in config if key not in known]:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if close:
            raise TowerError(f"the {what} `config` has the unknown key {key!r}; did you mean {close[0]!r}?")
        logger.warning("%s does not list the key %r; it is passed on as it is", kind.__name__, key)


def _with_width(encoder: WrappedEncoder) -> WrappedEncoder:
    size = tuple(encoder.config.image_size)
    encoder.config.hidden_size = _probe(encoder, size).last_hidden_state.shape[-1]
    return encoder


def _probe(encoder: nn.Module, size: tuple[int, int]) -> Any:
    """What the encoder makes of one black picture. Raises TowerError when it does not take pictures of this size."""
    try:
        with torch.no_grad():
            return encoder.eval()(torch.zeros(1, 3, *size), output_hidden_states=True, return_dict=True)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # each source has its own
        raise TowerError(
            f"{type(encoder).__name__} does not take pictures of {size[0]} x {size[1]} pixels: {error}. Set image_size to "
            "what it was made for, or wrap it as an encoder of your own (docs/encoders.md)"
        ) from error


def _checked_options(name: str, kind: type[Projector], options: Mapping[str, Any]) -> dict[str, Any]:
    known = options_of(kind)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TowerError(f"projector_options has no {unknown[0]!r} for {name!r}, which has {', '.join(known) or 'none'}")
    return dict(options)


def _reduced(encoder: nn.Module, spec: VisionSpec, name: str, prefix: int, options: Mapping[str, Any]) -> ReducedEncoder:
    """The encoder with a projector of fewer tokens behind its feature layer."""
    layer = _feature_layer(spec, encoder)
    size = image_size(spec, encoder)
    config = reduced_config(encoder.config, name, options, feature_layer=layer, prefix=prefix, image_size=size)
    return ReducedEncoder(config, encoder)


def _build_language_model(spec: LanguageSpec, tokenizer: Any) -> nn.Module:
    if (spec.source is None) == (spec.config is None):
        raise TowerError("a language model needs either `source` (pretrained) or `config` (random weights)")
    if spec.source is not None:
        model = load_whole(AutoModelForCausalLM, spec.source, "language model")
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        return model
    config = dict(spec.config or {})
    kind = config.pop("model_type", None)
    if kind is None:
        raise TowerError("the language `config` lacks `model_type` (for example llama, qwen2, qwen3)")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **ids, **config}
    if config["vocab_size"] < len(tokenizer):
        raise TowerError(
            f"the language model has {config['vocab_size']} embeddings, its tokenizer {len(tokenizer)} tokens; "
            "raise vocab_size or leave it out"
        )
    return model_from_config(AutoModelForCausalLM, kind, config, "language")


def _load_tokenizer(spec: LanguageSpec) -> Any:
    if spec.source is None:
        raise TowerError("a language model from a configuration needs a tokenizer: the teacher's or a trained one")
    return load_tokenizer(spec.source)


def _feature_layer(spec: VisionSpec, encoder: nn.Module) -> int:
    if isinstance(encoder, WrappedEncoder | ReducedEncoder):
        return -1
    return -2 if spec.feature_layer is None else spec.feature_layer


def _feature_layout(encoder: nn.Module, spec: VisionSpec) -> tuple[int, int, str]:
    """(visual tokens of an image, prefix tokens counted by the processor, LLaVA's select strategy).

    A class token stands first and LLaVA's strategy "default" drops it; encoders without one use "full".
    """
    size = image_size(spec, encoder)
    layer = _feature_layer(spec, encoder)
    states = _probe(encoder, size).hidden_states
    if not -len(states) <= layer < len(states):
        raise TowerError(f"feature_layer {layer} is not one of the {len(states)} hidden states of {type(encoder).__name__}")
    hidden = states[layer]
    if hidden.dim() != 3:
        raise TowerError(
            f"{type(encoder).__name__} gives hidden states of shape {list(hidden.shape)}, not [n, N, Dv]; "
            "wrap it as an encoder of your own (docs/encoders.md)"
        )
    # Hierarchical encoders (Swin, FocalNet) name no width of their last stage; LLaVA's projector reads it from `hidden_size`.
    encoder.config.hidden_size = hidden.shape[-1]
    total = hidden.shape[1]
    grid = _grid(encoder, size, total)
    if total == grid + 1:
        return grid, 1, "default"
    return total, 0, "full"


def _grid(encoder: nn.Module, size: tuple[int, int], total: int) -> int:
    patch = getattr(encoder.config, "patch_size", None)
    return (size[0] // patch) * (size[1] // patch) if isinstance(patch, int) else total


def image_size(spec: VisionSpec, encoder: nn.Module | None = None) -> tuple[int, int]:
    """(height, width) in pixels: the spec's, else the encoder's own."""
    size = spec.image_size or getattr(getattr(encoder, "config", None), "image_size", None) or (224, 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _processor(
    spec: VisionSpec, encoder: nn.Module, tokenizer: Any, features: int, prefix: int, strategy: str, template: str
) -> LlavaProcessor:
    height, width = image_size(spec, encoder)
    mean, std = pixel_statistics(spec, encoder)
    # LlavaProcessor counts (H // patch) * (W // patch) + extra placeholders. When the grid does not say it, a patch
    # larger than the picture makes the product 0 and `extra` carries the whole count.
    patch = getattr(encoder.config, "patch_size", None)
    fits = isinstance(patch, int) and (height // patch) * (width // patch) == features
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": height, "width": width}, do_center_crop=False, image_mean=mean, image_std=std
        ),
        tokenizer=tokenizer,
        patch_size=patch if fits else max(height, width) + 1,
        num_additional_image_tokens=prefix if fits else features + (strategy == "default"),
        vision_feature_select_strategy=strategy,
        chat_template=template,
        image_token=IMAGE,
    )


def pixel_statistics(spec: VisionSpec, encoder: nn.Module) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) by colour: the spec's, else what the pretrained weights expect, else CLIP's."""
    known = None
    encoder = encoder.encoder if isinstance(encoder, ReducedEncoder) else encoder
    if spec.source is not None:
        _, _, name = spec.source.partition(":")
        known = getattr(encoder.backbone, "statistics", None) if isinstance(encoder, WrappedEncoder) else _hub_statistics(name)
    mean, std = known or (CLIP_MEAN, CLIP_STD)
    return list(spec.mean or mean), list(spec.std or std)


def _hub_statistics(name: str) -> tuple[list[float], list[float]] | None:
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # each folder fails in its own way
        logger.warning("%s has no image processor (%s); pixels are normalised with CLIP's mean and deviation", name, error)
        return None
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return (list(mean), list(std)) if mean is not None and std is not None else None


def _chat_template(spec: LanguageSpec, tokenizer: Any) -> str:
    if spec.chat_template is not None:
        return CHAT_TEMPLATES.get(spec.chat_template, spec.chat_template)
    vocabulary = tokenizer.get_vocab()
    if "<|assistant|>" in vocabulary and "<|end|>" in vocabulary:
        return CHAT_TEMPLATES["simple"]
    if "<|im_start|>" in vocabulary:
        return CHAT_TEMPLATES["chatml"]
    return CHAT_TEMPLATES["llama3" if "<|start_header_id|>" in vocabulary else "vicuna"]


def _generation_config(tokenizer: Any) -> GenerationConfig:
    if tokenizer.eos_token_id is None:
        raise TowerError(f"{type(tokenizer).__name__} has no end-of-sequence token; set tokenizer.eos_token")
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>", "<|end|>") if t in vocabulary} | {tokenizer.eos_token_id}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad, bos_token_id=tokenizer.bos_token_id, do_sample=False)


def _plain_head(language_model: nn.Module) -> None:
    """LLaVA's head is a matrix and nothing more: what a family does besides to its logits is taken off or refused."""
    kind, config = type(language_model).__name__, language_model.config
    if language_model.get_output_embeddings().bias is not None:
        raise TowerError(f"{kind} has a head with a bias, which LLaVA's layout cannot hold")
    for name in ("logit_scale", "logits_scaling"):
        scale = getattr(config, name, None)
        if scale not in (None, 1):
            raise TowerError(
                f"{kind} multiplies or divides its logits ({name} {scale}), for which LLaVA's layout has no place; "
                f"set {name} to 1 in a `config`, or use another language model"
            )
    if getattr(config, "final_logit_softcapping", None) is not None:
        logger.info("%s: the soft cap of the logits, which keeps their order, is left out of the student", kind)
        config.final_logit_softcapping = None


def _fill(model: LlavaForConditionalGeneration, encoder: nn.Module, language_model: nn.Module) -> None:
    """Copies the parts' weights into the assembled model."""
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.tie_weights()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no unknown character, ever) with the turn markers of the "simple" template.

    `vocab_size` counts the special tokens and the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [*dict.fromkeys([*_SPECIAL.values(), *_TURNS])]
    least = len(specials) + 256
    if vocab_size < least:
        raise TowerError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone are {least}")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    extra = [t for t in _TURNS if t not in _SPECIAL.values()]
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=extra, padding_side="left", **_SPECIAL)


def load_tokenizer(folder: str | Path) -> Any:
    """A tokenizer by folder or hub id."""
    return load_beside(AutoTokenizer, folder, "tokenizer")
