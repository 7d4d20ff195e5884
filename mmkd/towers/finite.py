"""Whether weights are finite: one pass over each tensor, without a copy, and one answer from the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmkd.errors import NotFiniteError, TowerError

NAMED = 4  # tensors that a message names


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or an infinity. Whole numbers and packed weights are taken as they are."""
    names, flags = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta" and tensor.element_size() > 1:
            names.append(name)
            flags.append(_is_finite(tensor.detach()))
    devices = {flag.device for flag in flags}
    if not flags or (len(devices) == 1 and bool(torch.stack(flags).all())):
        return []
    return [name for name, flag in zip(names, flags, strict=True) if not bool(flag)]


def _is_finite(tensor: Tensor) -> Tensor:
    """[] bool. The least and the largest of all values are finite if and only if all are, and take no second tensor."""
    least, largest = torch.aminmax(tensor)
    return torch.isfinite(least) & torch.isfinite(largest)


def check_weights(model: nn.Module, what: str) -> None:
    """Raises TowerError, with the tensors' names, for a model that was loaded with values that are not finite."""
    if wrong := not_finite(model.state_dict().items()):
        raise TowerError(f"{what} has weights that are not finite: {named(wrong)}; nothing can be learnt from it or asked of it")


def check_trained(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises NotFiniteError for weights that training made infinite or NaN, before they are written."""
    if wrong := not_finite(tensors):
        raise NotFiniteError(
            f"{what}: {len(wrong)} trained tensors are not finite: {named(wrong)}; they are not saved. Lower the learning rate; "
            "the same command goes on from the newest checkpoint"
        )


def named(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
