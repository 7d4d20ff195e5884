"""Writing students that load without mmkd, and what serving engines make of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from mmkd.towers.families import LANGUAGE_NAMES

# Widths of attention heads that vLLM 0.32 computes on a CPU; on a GPU it takes any multiple of 8 up to 256.
HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
WIDENED = ("llama", "qwen2", "mistral")  # language models whose attention `with_wider_heads` knows
SERVED_ENCODERS = ("clip_vision_model", "siglip_vision_model", "pixtral")  # of LLaVA folders, by vLLM's own LLaVA


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its LoRA adapters, if it has any, merged into plain weights. The model itself is not changed."""
    if not _has_adapters(model):
        yield model
        return
    yield _merge(copy.deepcopy(model))


def with_hub_names(model: nn.Module) -> nn.Module:
    """The model, which `save_pretrained` then writes with the tensor names of published folders.

    transformers leaves the prefix `vision_model.` of CLIP and SigLIP encoders out of models that it did not load, and serving
    engines look for it. A LLaVA loaded from a folder without it is written with it, too.
    """
    if model.config.model_type == "llava" or getattr(model, "_weight_conversions", None) is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        if any(getattr(conversion, "prefix_to_remove", None) == "vision_model" for conversion in found):
            model._weight_conversions = found
    return model


def serving_remarks(model: nn.Module) -> list[str]:
    """What stands in the way of serving a model by vLLM, in words; [] where nothing that is known does."""
    width, found = _head_width(model), []
    if width not in HEAD_WIDTHS:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        more = f"; `mmkd export --to vllm` writes them {served_width(model)} wide" if served_width(model) else ""
        found.append(f"its attention heads are {width} wide; vLLM on a CPU takes {widths} (a GPU: multiples of 8){more}")
    if options := serving_options(model):
        found.append(f"vLLM's own LLaVA does not know the encoder {_encoder(model)!r}; serve it with {' '.join(options)}")
    return found


def serving_options(model: nn.Module) -> list[str]:
    """What `vllm serve` has to be told of a model beside its folder."""
    known = model.config.model_type != "llava" or _encoder(model) in SERVED_ENCODERS
    return [] if known else ["--model-impl", "transformers"]


def served_width(model: nn.Module) -> int | None:
    """The width of attention heads to which `with_wider_heads` brings a model; None where it need not or cannot."""
    text, width = model.config.get_text_config(), _head_width(model)
    rope = getattr(text, "rope_parameters", None) or {}
    plain = text.model_type in WIDENED and rope.get("rope_type") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    if width in HEAD_WIDTHS or width % 2 or not plain:
        return None
    return next((wide for wide in HEAD_WIDTHS if wide > width), None)


def with_wider_heads(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same function whose attention heads have a width that vLLM takes; the model itself where it has it already.

    Heads are filled up with zeros, both halves of each, since numbers are rotated in pairs across them. That pair i turns as
    before takes another base: base' ^ (-2i / D) = base ^ (-2i / d) for base' = base ^ (D / d). Scores are divided by the square
    root of D in place of d, so queries are multiplied by that of D / d.
    """
    wide = served_width(model)
    if wide is None:
        return model
    config, width = copy.deepcopy(model.config), _head_width(model)
    text = config.get_text_config()
    text.head_dim = wide
    text.rope_parameters["rope_theta"] **= wide / width
    queries, keys = text.num_attention_heads, text.num_key_value_heads
    layer = {"q_proj": (queries, (wide / width) ** 0.5), "k_proj": (keys, 1.0), "v_proj": (keys, 1.0)}
    state = dict(model.state_dict())
    for name, value in state.items():
        inside = set(name.split("."))
        part = name.split(".")[-2] if inside & {*LANGUAGE_NAMES} and "self_attn" in inside else ""
        if part in layer:
            heads, scale = layer[part]
            state[name] = _filled_up(value, heads, wide) * scale
        elif part == "o_proj" and name.endswith("weight"):
            state[name] = _filled_up(value.T, queries, wide).T.contiguous()
    found = type(model)(config).to(model.dtype)
    found.load_state_dict(state)
    found.generation_config = model.generation_config
    return found.eval()


def _filled_up(rows: Tensor, heads: int, wide: int) -> Tensor:
    """[heads * d, ...] -> [heads * wide, ...], zeros behind each half of a head."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    found = rows.new_zeros(heads, 2, wide // 2, *rows.shape[1:])
    found[:, :, : halves.shape[2]] = halves
    return found.reshape(heads * wide, *rows.shape[1:])


def _head_width(model: nn.Module) -> int:
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _encoder(model: nn.Module) -> str | None:
    return getattr(getattr(model.config, "vision_config", None), "model_type", None)


def _has_adapters(model: nn.Module) -> bool:
    if "peft" not in sys.modules:  # nobody can have added an adapter; importing peft takes seconds
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(m, BaseTunerLayer) for m in model.modules())


def _merge(model: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    model._hf_peft_config_loaded = False  # else `save_pretrained` would look for adapters
    return model
