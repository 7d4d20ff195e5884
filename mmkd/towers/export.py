"""Writing students that load without mmkd, and what serving engines make of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

# Widths of attention heads that vLLM 0.32 computes on a CPU; on a GPU it takes any multiple of 8 up to 256.
HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
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
    config = model.config
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found = []
    if width not in HEAD_WIDTHS:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        found.append(f"its attention heads are {width} wide; vLLM on a CPU takes {widths} (a GPU: multiples of 8)")
    if options := serving_options(model):
        found.append(f"vLLM's own LLaVA does not know the encoder {_encoder(model)!r}; serve it with {' '.join(options)}")
    return found


def serving_options(model: nn.Module) -> list[str]:
    """What `vllm serve` has to be told of a model beside its folder."""
    known = model.config.model_type != "llava" or _encoder(model) in SERVED_ENCODERS
    return [] if known else ["--model-impl", "transformers"]


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
