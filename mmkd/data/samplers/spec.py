"""How a recipe describes the order of a stage's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch.utils.data import Sampler

from mmkd.base.plugged import Plugged
from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample


class SamplerSpec(Plugged):
    of: ClassVar[str] = "samplers"
    one: ClassVar[str] = "sampler"

    def order(self) -> SampleOrder:
        """The sampler that this describes."""
        return self.made()

    def build(
        self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int
    ) -> Sampler[int] | Sequence[int] | None:
        """See `SampleOrder.build`."""
        return self.order().build(samples, sizes, batch_size, seed)
