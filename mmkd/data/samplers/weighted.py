"""Data entries in given shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.registry import register


@register("samplers", "weighted")
@dataclass(frozen=True)
class Weighted(SampleOrder):
    """Samples drawn with replacement, so that the data entries have given shares of an epoch."""

    weights: tuple[float, ...] = ()  # one for each data entry, in order; () for equal shares

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> WeightedSampler:
        weights = self.weights or (1.0,) * len(sizes)
        if len(weights) != len(sizes) or min(weights) < 0 or sum(weights) == 0:
            raise DataError(
                f"sampler.weights is {list(weights)}; {len(sizes)} data entries need as many weights, none negative, not all 0"
            )
        return WeightedSampler(weights, sizes, seed)


class WeightedSampler(Sampler[int]):
    """As many draws an epoch as there are samples. The order follows from seed and epoch alone."""

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int):
        shares = [weight / max(1, size) for weight, size in zip(weights, sizes, strict=True)]
        self.weights = torch.tensor(shares, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))  # [samples]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()
