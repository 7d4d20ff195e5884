"""Writing students that load without mmkd."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its LoRA adapters, if it has any, merged into plain weights. The model itself is not changed."""
    if not _has_adapters(model):
        yield model
        return
    yield _merge(copy.deepcopy(model))


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
