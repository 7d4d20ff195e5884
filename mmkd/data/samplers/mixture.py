"""Data entries as domains whose shares move with what the student has left to learn in each."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.utils.data import Sampler

from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.registry import register

FILE = "mixture.json"  # of a checkpoint


@register("samplers", "ddk")
@dataclass(frozen=True)
class DDK(SampleOrder):
    """Data entries drawn by how far the student's perplexity is above the teacher's, measured anew as it learns (DDK,
    arXiv 2407.16154).

    every: steps between two measurements.  a: weight of the ratios against equal shares.  held_out: samples of each entry, at
    most a tenth of it, that are measured on and never drawn. A measurement counts `every` steps after it was made, so that
    batches that are prepared ahead do not depend on it.
    """

    of_teacher: ClassVar[bool] = True

    every: Annotated[int, Field(ge=2)] = 1000
    a: Annotated[float, Field(ge=0, le=1)] = 0.5
    held_out: Annotated[int, Field(ge=1)] = 500

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> MovingMixture:
        if len(sizes) < 2:
            raise DataError("sampler ddk: one data entry is one domain; give several")
        return MovingMixture(sizes, self.every, self.a, self.held_out, batch_size, seed)


class MovingMixture(Sampler[int]):
    """Draws without replacement within an entry, entries by shares that `measured` moves.

    The order follows from the seed and the shares of each round; these are what a checkpoint keeps.
    """

    def __init__(self, sizes: Sequence[int], every: int, a: float, held_out: int, batch_size: int, seed: int):
        self.sizes, self.every, self.a, self.batch_size, self.seed = sizes, every, a, batch_size, seed
        self.epoch = 0
        self.rounds: list[list[float]] = []  # the shares that were found at each measurement, the first before step 1
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.measured_on, self._drawn = [], []
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            places = list(range(start, start + size))
            out = min(held_out, size // 10)
            if not out:
                raise DataError(f"sampler ddk: data entry {number + 1} has {size} samples; ten at least are needed")
            held = set(random.Random(f"held out {seed} {number}").sample(places, out))
            self.measured_on.append(sorted(held))
            self._drawn.append([place for place in places if place not in held])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._drawn))

    def measured(self, student: Sequence[float], teacher: Sequence[float]) -> None:
        """Perplexities of student and teacher in each entry, before step 1 and each `every` steps. Raises DataError."""
        if not all(map(math.isfinite, [*student, *teacher])):
            raise DataError("sampler ddk: a perplexity is not finite")
        before = self.rounds[-1] if self.rounds else None
        self.rounds.append(first_shares(student, teacher) if before is None else moved(before, student, teacher, self.a))

    def shares_of(self, draw: int) -> list[float]:
        """The shares by which the `draw`-th draw of the stage is made. Raises DataError where they are not known yet."""
        number = max(0, draw // (self.every * self.batch_size) - 1)
        if number >= len(self.rounds):
            raise DataError("sampler ddk: batches are prepared further ahead than `every` steps; raise it, or lower `workers`")
        return self.rounds[number]

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"mixture {self.seed} {self.epoch}")
        queues: list[list[int]] = [[] for _ in self.sizes]
        for draw in range(len(self)):
            shares = self.shares_of(self.epoch * (len(self) // self.batch_size * self.batch_size) + draw)
            (entry,) = generator.choices(range(len(shares)), shares)
            if not queues[entry]:  # exhausted: from the beginning, in another order
                queues[entry] = generator.sample(self._drawn[entry], len(self._drawn[entry]))
            yield queues[entry].pop()

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.rounds) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises DataError for a checkpoint without shares."""
        try:
            self.rounds = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / FILE} holds no shares of data entries; delete this checkpoint") from error


def first_shares(student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """Shares before step 1, by exp of the ratios of perplexities."""
    ratios = [s / t for s, t in zip(student, teacher, strict=True)]
    weights = torch.tensor(ratios, dtype=torch.float64).softmax(0)
    return weights.tolist()


def moved(before: Sequence[float], student: Sequence[float], teacher: Sequence[float], a: float) -> list[float]:
    """Shares after a measurement: those before times exp of the ratios, mixed with equal ones by 1 - a."""
    ratios = torch.tensor([s / t for s, t in zip(student, teacher, strict=True)], dtype=torch.float64)
    weights = (torch.tensor(before, dtype=torch.float64).log() + ratios).softmax(0)
    return (a * weights + (1 - a) / len(before)).tolist()
