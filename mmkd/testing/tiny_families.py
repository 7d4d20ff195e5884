"""Every image-text family of the installed transformers as a tower of a few thousand random weights, without a network.

A configuration class's own defaults are shrunk by rules on the names of their keys (`tiny_rules.py`); what single families need
besides is data, too (`tiny_data.py`). Image processor and processor are the family's own classes, the tokenizer is trained on the
spot and given the family's special tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from mmkd.errors import TowerError
from mmkd.testing.tiny_data import TINY, Tiny
from mmkd.testing.tiny_rules import DERIVED, IMAGE_PROCESSORS, PROCESSORS, RULES, TEXT_PARTS
from mmkd.towers.assemble import train_tokenizer
from mmkd.towers.families import REFUSED
from mmkd.towers.tower import Tower

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ("red", "green", "blue", "What colour is it?", "How many are there in all?", "Read the word.", "seven of them")
MAX_LENGTH = 4096  # some processors write hundreds of tokens, whatever the picture
VOCABULARY = 300  # special tokens of the template, 256 bytes, and a few merges


def image_text_families() -> list[str]:
    """Model types that the installed transformers loads as image-text models, sorted."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def why_no_tower(family: str) -> str | None:
    """The reason why a family can be no tower, not even a teacher of rows, or None where it can."""
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise TowerError(f"{family!r} is no image-text family of transformers {transformers.__version__}")
    return f"no tower: {REFUSED[family]}" if family in REFUSED else None


def tiny_family(family: str, seed: int = 0) -> Tower:
    """A tower of one family with random weights drawn from `seed`.

    Raises TowerError for a family that can be no tower, and whatever transformers raises for one that cannot be built.
    """
    if reason := why_no_tower(family):
        raise TowerError(reason)
    data = TINY.get(family, Tiny())
    tokenizer = _tokenizer(data)
    config = tiny_config(family, data, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        draw_weights(model)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return Tower(model, tiny_processor(family, data, tokenizer), max_length=MAX_LENGTH)


# ---- configuration ---------------------------------------------------------------------------------------------------


def tiny_config(family: str, data: Tiny, tokenizer: Any) -> PreTrainedConfig:
    """The family's default configuration with small numbers, the tokenizer's ids and the family's exceptions."""
    start = CONFIG_MAPPING[family](**data.start).to_dict()
    small = shrunken(start, text=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in data.tokens.items()}
    ids |= {name.removesuffix("_id"): getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = merged(with_ids(small, ids, len(tokenizer)), data.config)
    if data.mapped:
        known = (*data.mapped, *data.tokens.values())
        small["vocabulary_map"] = {token: tokenizer.convert_tokens_to_ids(token) for token in known}
    small.pop("model_type", None)
    return AutoConfig.for_model(family, **small)


def shrunken(node: Mapping[str, Any], *, text: bool) -> dict[str, Any]:
    """The mapping with the sizes of RULES; keys that a configuration derives from others are left out.

    `text`: which of a rule's two values applies, that of language models or that of encoders.
    """
    small: dict[str, Any] = {}
    for key, value in node.items():
        if key in DERIVED:
            continue
        if isinstance(value, Mapping):
            small[key] = shrunken(value, text=text if not str(key).endswith("_config") else key in TEXT_PARTS)
        else:
            small[key] = _small_value(key, value, text)
    return small


def _small_value(key: str, value: Any, text: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for pattern, (of_text, of_encoder) in RULES.items():
        if re.fullmatch(pattern, str(key)):
            return of_text if text else of_encoder
    return value


def with_ids(node: Mapping[str, Any], ids: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """Token ids by name (`image_token` is `image_token_id` or `image_token_index`) and the vocabulary's size, at every depth."""
    filled: dict[str, Any] = {}
    for key, value in node.items():
        name = re.sub(r"_(id|index)$", "", str(key))
        if isinstance(value, Mapping):
            filled[key] = with_ids(value, ids, vocabulary)
        elif key in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
            filled[key] = vocabulary
        else:
            filled[key] = ids[name] if name != key and name in ids else value
    return filled


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mappings within mappings alike."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Weights of a size at which narrow models tell pictures and tokens apart.

    Matrices get deviation 1 / sqrt(inputs), vectors of zeros (gates, biases) a little noise, since behind a gate of zero
    nothing could be checked.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif not parameter.any():
            parameter.normal_(0, 0.1)


# ---- processor -------------------------------------------------------------------------------------------------------


@cache
def _plain_tokenizer() -> Any:
    return train_tokenizer(TEXTS, VOCABULARY)


def _tokenizer(data: Tiny) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the family's special tokens, known by the names that its processor asks for."""
    from tokenizers import Tokenizer

    plain = _plain_tokenizer()
    turns = ["<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>", *data.more_tokens, *data.mapped]
    turns += [token for name, token in data.tokens.items() if name in data.unnamed]
    unnamed = ("bos_token", "eos_token", "pad_token", *data.unnamed)
    named = {name: token for name, token in data.tokens.items() if name not in unnamed}
    specials = {
        "eos_token": data.tokens.get("eos_token", "<|end|>"),
        "pad_token": data.tokens.get("pad_token", "<|pad|>"),
        "unk_token": "<|pad|>",
        "bos_token": data.tokens.get("bos_token"),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain.backend_tokenizer.to_str()),
        extra_special_tokens=named,
        padding_side="left",
        **{name: token for name, token in specials.items() if token is not None},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": turns}, replace_extra_special_tokens=False)
    return tokenizer


def tiny_processor(family: str, data: Tiny, tokenizer: Any) -> Any:
    """The family's processor around its image processor, both set to small pictures."""
    name = data.processor_class or PROCESSOR_MAPPING_NAMES.get(family)
    if name is None:
        raise TowerError(f"transformers names no processor for {family!r}")
    kind = getattr(transformers, name)
    parts: dict[str, Any] = {}
    for attribute in kind.get_attributes():
        if attribute == "tokenizer":
            parts[attribute] = tokenizer
        elif attribute.endswith("tokenizer"):
            parts[attribute] = _tokenizer(Tiny())
        elif attribute == "image_processor":
            parts[attribute] = _image_processor(family, data)
        elif attribute == "video_processor":
            parts[attribute] = _video_processor(family, data)
        elif attribute in data.parts:
            part, arguments = data.parts[attribute]
            parts[attribute] = getattr(transformers, part)(**arguments)
        else:
            raise TowerError(f"{name} needs a {attribute}, of which nothing is known here")
    template = data.begin + TEMPLATE.replace("IMAGE", data.image)
    known = inspect.signature(kind.__init__).parameters
    arguments = {key: value for key, value in PROCESSORS.items() if key in known} | data.processor
    processor = kind(**parts, **arguments)
    processor.chat_template = tokenizer.chat_template = template
    if data.images_kwargs:  # what its class has for every call
        processor.images_kwargs = {**getattr(processor, "images_kwargs", {}), **data.images_kwargs}
    return processor


def _image_processor(family: str, data: Tiny) -> Any:
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(family) or {}
    name = data.image_processor_class or names.get("torchvision") or names.get("pil")
    if name is None:
        raise TowerError(f"transformers names no image processor for {family!r}")
    return getattr(transformers, name)(**merged(IMAGE_PROCESSORS.get(name, {}), data.image_processor))


def _video_processor(family: str, data: Tiny) -> Any:
    name = data.video_processor_class or (VIDEO_PROCESSOR_MAPPING_NAMES.get(family) or {}).get("torchvision")
    if name is None:
        raise TowerError(f"transformers names no video processor for {family!r}")
    return getattr(transformers, name)(**data.video_processor)
