"""Where vision encoder, projector and language model are within a transformers model, and how wide what they hand on is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.towers.families import SHUFFLE_NAMES, child

PARTS = ("vision", "projector", "language")
# Below it stands what a projector with fewer tokens trains, within the vision encoder (see `mmkd.towers.encoders.reduced`).
REDUCER = ".vision_tower.reducer."


def part_named(base: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    """The child of `base` with one of these names. Raises TowerError when there is none."""
    name = child(base, names)
    if name is None:
        raise TowerError(f"{type(base).__name__} has no {what} named one of {', '.join(names)}")
    return base.get_submodule(name)


def parameters_by_part(model: nn.Module, vision: nn.Module, projector: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters of each of PARTS; those of neither encoder nor projector are of the language model."""
    of_projector, of_vision = set(map(id, projector.parameters())), set(map(id, vision.parameters()))
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        in_projector = REDUCER in f".{name}" or id(parameter) in of_projector
        part = "projector" if in_projector else "vision" if id(parameter) in of_vision else "language"
        parts[part].append((name, parameter))
    return parts


def feature_width(projector: nn.Module) -> int:
    """Width Dv that a projector reads: that of its first norm or matrix, before a pixel shuffle of its own.

    Raises TowerError for one that has neither.
    """
    merged = _merged_patches(projector)
    first = next((m.in_features for m in projector.modules() if isinstance(m, nn.Linear)), None)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            return module.in_features // merged
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            return len(weight) // (merged if len(weight) == first else 1)
    raise TowerError(f"{type(projector).__name__} has neither a norm nor a matrix that tells its input width")


def _merged_patches(projector: nn.Module) -> int:
    """Neighbouring features that the projector's own pixel shuffle makes one of."""
    sides = [getattr(projector, name, None) for name in SHUFFLE_NAMES]
    return next((side**2 for side in sides if isinstance(side, int)), 1)


@contextmanager
def first_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Records the first input of each call of `module`, or of the first of several that follow each other."""
    captured: list[Tensor] = []
    first = module[0] if type(module) is nn.Sequential else module

    def record(_: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        captured.append(positional[0] if positional else next(iter(named.values())))

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()
