"""Batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from mmkd.data.lazy import Lazy, is_lazy
from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.registry import register

WINDOW = 50  # batches that are sorted together: long enough for even batches, short enough to stay a random order


@register("samplers", "length")
@dataclass(frozen=True)
class ByLength(SampleOrder):
    """Every sample once an epoch, in random batches of similar length: less padding."""

    def build(
        self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int
    ) -> LengthGroupedSampler:
        lengths = Lazy(samples, length_of) if is_lazy(samples) else lengths_of(samples)  # of many samples window by window
        return LengthGroupedSampler(lengths, batch_size, seed)


class LengthGroupedSampler(Sampler[int]):
    """Random batches of samples of similar length, in random order: less padding, the same samples an epoch.

    Samples with as many images stand together, so that batches without pictures need no vision encoder. The order
    follows from seed and epoch alone. (transformers' sampler of that name goes from long to short batches in a circle.)
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = WINDOW * self.batch_size
        for start in range(0, len(order), window):
            chosen = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
            rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # incomplete: the end of its window
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            yield from (i for b in [*(batches[k] for k in shuffled), *rest] for i in b)


def length_of(sample: Sample) -> tuple[int, int]:
    """(images, characters of text): what a sample's length follows from, known before it is prepared."""
    return len(sample.images), sum(len(turn.text) for turn in sample.turns)


def lengths_of(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """`length_of` each sample."""
    return [length_of(sample) for sample in samples]
