"""From a folder or hub id to model and processor; a tower's dtype by name, and its place on this process's GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know
from mmkd.errors import TowerError
from mmkd.towers.families import LANGUAGE_NAMES
from mmkd.towers.whole import load_beside, load_whole
from mmkd.towers.windows import group_windows


def load_model_and_processor(
    folder: str | Path, *, dtype: torch.dtype | str = "auto", quantise: str | None = None, trust_remote_code: bool = False,
    attn_implementation: str | None = None, device: torch.device | None = None,
) -> tuple[nn.Module, Any]:  # fmt: skip
    """An image-text model and its processor (see `Tower.load`). Raises TowerError where there is none."""
    extra: dict[str, Any] = {}
    if quantise is not None:
        extra["quantization_config"] = _quantisation(quantise)
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    if device is not None and device.type != "cpu" and not is_deepspeed_zero3_enabled():  # ZeRO-3 places weights itself
        extra["device_map"] = {"": device}
    what = "image-text model"
    model = load_whole(AutoModelForImageTextToText, folder, what, dtype=dtype, trust_remote_code=trust_remote_code, **extra)
    if attn_implementation is None:
        group_windows(model)
    return model, load_beside(AutoProcessor, folder, what, trust_remote_code=trust_remote_code)


def _quantisation(kind: str) -> BitsAndBytesConfig:
    """bitsandbytes for the language model alone: encoder and projector are small, and the row engine needs the head's weight."""
    outside = rf"(?!.*\b({'|'.join(LANGUAGE_NAMES)})\.).*"
    whole = {"llm_int8_skip_modules": [outside, "lm_head"]}
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **whole)
    if kind == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **whole)
    raise TowerError(f"quantise is {kind!r}; choose 8bit or 4bit")


def dtype_of(name: str) -> torch.dtype | str:
    """PyTorch's dtype of a name; "auto" stays, for what the weights are stored in."""
    return name if name == "auto" else getattr(torch, name)


def half_of(precision: str) -> torch.dtype | None:
    """The dtype of a stage's autocast by its `precision`; None for float32, which has none."""
    return None if precision == "float32" else getattr(torch, precision)


def device_of_process() -> torch.device:
    """This process's GPU, made its current one, or the CPU where there is none.

    Raises TowerError where the processes of this host are more than its GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise TowerError(
            f"process {index} of this host (LOCAL_RANK, counted from 0) needs a GPU of its own, but {count} can be seen here; "
            "start as many processes as there are GPUs, or let every process see all of them (CUDA_VISIBLE_DEVICES)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


class _HasModel(Protocol):
    model: nn.Module


Loaded = TypeVar("Loaded", bound=_HasModel)


def to_device(tower: Loaded) -> Loaded:
    """The tower on this process's GPU, if there is one; what was loaded straight onto it stays, quantised weights too."""
    device = device_of_process()
    if next(tower.model.parameters()).device != device:
        tower.model.to(device)
    return tower
