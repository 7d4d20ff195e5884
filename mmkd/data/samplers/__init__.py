"""Samplers: in which order, and how often, training samples are seen.

A sampler is one class in one file. A user's own stands in a module that the recipe names by `imports:`:

    @register("samplers", "shortest_first")
    @dataclass(frozen=True)
    class ShortestFirst(SampleOrder):
        '''The shortest samples first, in every epoch.'''

        def build(self, samples, sizes, batch_size, seed):
            return sorted(range(len(samples)), key=lambda i: len(samples[i].answer))

and is used by `sampler: {kind: shortest_first}` in a stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler

from mmkd.data.samples import Sample


@dataclass(frozen=True)
class SampleOrder(ABC):
    """What a recipe's `sampler:` says. Subclasses are frozen dataclasses; their fields are the options that a recipe may set."""

    @abstractmethod
    def build(
        self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int
    ) -> Sampler[int] | Sequence[int] | None:
        """Numbers of samples in the order of an epoch; None for the training loop's own random order.

        sizes: samples of each data entry of the stage, in order.  A sampler with a method `set_epoch` is told each epoch's
        number; its order must follow from seed and epoch alone, so that a resumed run goes on as an undisturbed one.
        Raises DataError for options that do not fit the data.
        """
