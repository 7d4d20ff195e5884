"""Vision encoders that transformers does not know: those of timm and open_clip, and your own.

A transformers encoder needs none of this. The others are wrapped in one `PreTrainedModel`, so that a student built on
them saves and loads like any other (after `import mmkd.towers.encoders`). The wrapper asks one thing of a backbone:
pixels [n, 3, H, W] in, vision features [n, N, Dv] out. Modules of this folder register encoders by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from mmkd.registry import register
from mmkd.towers.encoders.reduced import ReducedEncoder, ReducedEncoderConfig, reduced_config
from mmkd.towers.encoders.wrapped import EncoderConfig, WrappedEncoder, build_backbone, tokens_of

__all__ = [
    "EncoderConfig",
    "ReducedEncoder",
    "ReducedEncoderConfig",
    "WrappedEncoder",
    "build_backbone",
    "reduced_config",
    "register_encoder",
    "served",
    "tokens_of",
]

Build = TypeVar("Build", bound=Callable[..., nn.Module])


def register_encoder(name: str) -> Callable[[Build], Build]:
    """The same as `register("encoders", name)`."""
    return register("encoders", name)


def served() -> None:
    """vLLM's plug-in (entry point `vllm.general_plugins`): importing this module has made its encoders known to transformers."""
