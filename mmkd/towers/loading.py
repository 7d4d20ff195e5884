"""A tower's dtype by name, and its place on this process's GPU."""

from __future__ import annotations

import os

import torch

from mmkd.towers.tower import Tower


def dtype_of(name: str) -> torch.dtype | str:
    """PyTorch's dtype of a name; "auto" stays, for what the weights are stored in."""
    return name if name == "auto" else getattr(torch, name)


def device_of_process() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tower: Tower, quantise: str | None = None) -> Tower:
    """The tower on this process's GPU, if there is one; quantised weights are there already."""
    if quantise is None:
        tower.model.to(device_of_process())
    return tower
