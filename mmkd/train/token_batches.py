"""Micro-batches by tokens: the samples of a step, in as many pieces as a budget of tokens asks for (`micro_batch_tokens`).

A step keeps its `batch_size` samples, whatever their lengths, and every loss is a sum over the step divided by the step's counts.
So only the split changes: few long samples or many short ones are read at once, those of similar length together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkd.train.batch import Batch, Pair
from mmkd.train.collate import Collator
from mmkd.train.skips import Skip

SAVED = 8  # a micro-batch more costs its own kernels and Python: worth it if it saves the budget's n-th part
DRAWN = 64  # steps that are drawn to tell how many micro-batches they take


def padded(lengths: Sequence[Mapping[str, int]]) -> int:
    """Tokens of a micro-batch, padding included: each reading (`Pair.lengths`) is as long as its longest sample."""
    names = {name for own in lengths for name in own}
    return len(lengths) * sum(max(own.get(name, 0) for own in lengths) for name in names)


def split(lengths: Sequence[Mapping[str, int]], pictured: Sequence[bool], budget: int) -> list[list[int]]:
    """Places of samples, by micro-batch, of similar lengths: the split with the least padding, where each micro-batch more must
    save an eighth of the budget.

    lengths: of each sample, `Pair.lengths`.  pictured: whether it has pictures; those without stand together: no encoder.
    budget: padded tokens of a micro-batch; a sample that is longer by itself goes alone.  The longest come first.
    """
    names = sorted({name for own in lengths for name in own})
    order = sorted(range(len(lengths)), key=lambda n: (pictured[n], sum(lengths[n].values()), n))
    table = np.array([[lengths[n].get(name, 0) for name in names] for n in order], dtype=np.int64).reshape(len(order), -1)
    costs = np.zeros(len(order) + 1, dtype=np.int64)  # of the first so many samples, in padded tokens
    begins = [0] * (len(order) + 1)  # where the last micro-batch of the first so many samples begins
    low = 0  # what did not fit without a sample does not fit with it
    for end in range(1, len(order) + 1):
        longest = np.maximum.accumulate(table[low:end][::-1], axis=0).sum(1)  # of the last 1, 2, 3 ... samples
        sizes = longest * np.arange(1, end - low + 1)
        count = max(1, int((sizes <= budget).sum()))  # sizes only grow
        starts, low = end - np.arange(1, count + 1), end - count
        found = costs[starts] + sizes[:count]
        best = int(found.argmin())
        begins[end], costs[end] = int(starts[best]), found[best] + budget // SAVED
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups


@dataclass
class ByTokens:
    """A collator of a whole step (of one process), which gives its micro-batches."""

    collator: Collator
    budget: int

    def __call__(self, pairs: Sequence[Pair | Skip]) -> dict[str, list[Batch]]:
        kept = self.collator.kept(pairs)
        groups = split([pair.lengths() for pair in kept], [pair.student.images > 0 for pair in kept], self.budget)
        batches = [self.collator([kept[n] for n in group])["batch"] for group in groups]
        batches[0].skipped = [pair for pair in pairs if isinstance(pair, Skip)]
        return {"batch": batches}


def apart(collated: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a collator gave, a micro-batch each."""
    return [
        {"batch": batch}
        for inputs in collated
        for batch in (inputs["batch"] if isinstance(inputs["batch"], list) else [inputs["batch"]])
    ]


def count_line(pairs: Sequence[Pair], batch_size: int, budget: int) -> str:
    """How many micro-batches a step takes, in words, from steps that are drawn from some prepared samples."""
    lengths, pictured = [pair.lengths() for pair in pairs], [pair.student.images > 0 for pair in pairs]
    draw, counts = random.Random(0), []
    for _ in range(DRAWN):
        chosen = draw.choices(range(len(pairs)), k=batch_size)
        counts.append(len(split([lengths[n] for n in chosen], [pictured[n] for n in chosen], budget)))
    counts.sort()
    span = f" ({counts[0]} to {counts[-1]})" if counts[0] < counts[-1] else ""
    longer = sum(padded([own]) > budget for own in lengths)
    alone = f"; {longer} of {len(pairs)} samples looked at are longer, each goes alone" if longer else ""
    return f"micro-batches of at most {budget:,} tokens: about {counts[len(counts) // 2]} a step{span}{alone}"
