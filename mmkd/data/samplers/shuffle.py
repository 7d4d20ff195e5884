"""The training loop's own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.registry import register


@register("samplers", "shuffle")
@dataclass(frozen=True)
class Shuffle(SampleOrder):
    """Every sample once an epoch, in random order (the default)."""

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> None:
        return None
