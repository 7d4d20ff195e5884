"""From a folder or hub id to model and processor; a tower's dtype by name, and its place on this process's GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know
from mmkd.errors import TowerError
from mmkd.towers.families import LANGUAGE_NAMES
from mmkd.towers.whole import load_beside, load_whole


def load_model_and_processor(
    folder: str | Path, *, dtype: torch.dtype | str = "auto", quantise: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """An image-text model and its processor (see `Tower.load`). Raises TowerError where there is none."""
    extra: dict[str, Any] = {}
    if quantise is not None:
        extra["quantization_config"] = _quantisation(quantise)
    what = "image-text model"
    model = load_whole(AutoModelForImageTextToText, folder, what, dtype=dtype, trust_remote_code=trust_remote_code, **extra)
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


def device_of_process() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


class _HasModel(Protocol):
    model: nn.Module


Loaded = TypeVar("Loaded", bound=_HasModel)


def to_device(tower: Loaded, quantise: str | None = None) -> Loaded:
    """The tower on this process's GPU, if there is one; quantised weights are there already."""
    if quantise is None:
        tower.model.to(device_of_process())
    return tower
