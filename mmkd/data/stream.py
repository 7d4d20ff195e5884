"""Training samples that come one after another, where there is no room for all of them.

The order follows from the seed alone: pass after pass over the source, each in another order (see `Format.stream`), samples
through a shuffling buffer. So a resumed run goes on with the sample that comes next, after running past those it had.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mmkd.data.samples import Sample
from mmkd.data.tally import Tally
from mmkd.errors import DataError

BUFFER = 1024  # samples that are shuffled among one another
HEAD = 512  # samples that are looked at before training: by guards, by the estimate, by a tokenizer that is trained


@dataclass(frozen=True)
class Stream:
    """An endless order of samples. passes: the samples of pass 0, 1, 2 ..., each in an order of its own."""

    passes: Callable[[int], Iterator[Sample]]
    seed: int
    buffer: int = BUFFER
    tally: Tally = field(default_factory=Tally)  # of the rows that were read

    def __iter__(self) -> Iterator[Sample]:
        for number in itertools.count():
            found = 0
            for sample in shuffled(self.passes(number), self.buffer, random.Random(f"stream {self.seed} {number}")):
                found += 1
                yield sample
            if not found:
                raise DataError("a stream has no samples")

    def head(self, count: int = HEAD) -> list[Sample]:
        """The first samples of the order, fewer if a whole pass has fewer."""
        return list(itertools.islice(shuffled(self.passes(0), self.buffer, random.Random(f"stream {self.seed} 0")), count))


def shuffled(samples: Iterator[Sample], buffer: int, draw: random.Random) -> Iterator[Sample]:
    """Each sample changes places with one of the `buffer` before it."""
    kept: list[Sample] = []
    for sample in samples:
        if len(kept) < buffer:
            kept.append(sample)
            continue
        place = draw.randrange(buffer)
        kept[place], sample = sample, kept[place]
        yield sample
    draw.shuffle(kept)
    yield from kept
