"""Pictures that are mixed with others, for terms that compare what two towers see in them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from pydantic import Field

from mmkd.base.schema import Strict
from mmkd.data.lazy import Lazy, is_lazy
from mmkd.data.samples import ImageRef, Sample

TRIES = 8  # other samples that are looked at for one with a picture


class MixupSpec(Strict):
    """Mixes pictures of a data entry with each other, in pixels; both towers see the same mixture. Answers are never mixed.

    Mixup in distillation (arXiv 2211.03946); share and alpha are our choice, and so is that a sample keeps its partner.
    """

    share: float = Field(0.5, ge=0, le=1)  # of the samples with a picture
    alpha: float = Field(0.2, gt=0, le=1e3)  # the own picture's share is drawn from Beta(alpha, alpha)


@dataclass(frozen=True)
class MixedPicture:
    """`share` of one picture and the rest of another, which is brought to its size. A `mmkd.towers.samples.Picture`."""

    own: ImageRef
    other: ImageRef
    share: float

    @property
    def name(self) -> str:
        return f"{self.share:.6f} {self.own.name} {self.other.name}"

    @property
    def key(self) -> str:
        return f"{self.share:.6f} {self.own.key} {self.other.key}"

    file: Any = None  # what is read is in none of its own

    def exists(self) -> bool:
        return self.own.exists() and self.other.exists()

    def read_bytes(self) -> bytes:
        return self.own.read_bytes() + self.other.read_bytes()

    def load(self) -> Image.Image:
        """Raises ImageError where one of them cannot be read."""
        own, other = self.own.load(), self.other.load()
        return Image.blend(other.resize(own.size), own, self.share)


def mixed(samples: Sequence[Sample], spec: MixupSpec | None, seed: int) -> Sequence[Sample]:
    """The samples, some of them with mixed pictures. Which, with what and how much follows from seed and id alone."""
    if spec is None or not spec.share:
        return samples
    make = _Mixing(samples, spec, seed)
    if is_lazy(samples):
        return samples.then(make) if isinstance(samples, Lazy) else Lazy(samples, make)
    return [make(sample) for sample in samples]


@dataclass(frozen=True)
class _Mixing:
    samples: Sequence[Sample]
    spec: MixupSpec
    seed: int

    def __call__(self, sample: Sample) -> Sample:
        digest = hashlib.blake2b(f"mixup {self.seed} {sample.id}".encode(), digest_size=8).digest()
        draw = random.Random(int.from_bytes(digest, "big"))
        if not sample.images or draw.random() >= self.spec.share:
            return sample
        own = {ref.key for ref in sample.images}
        for _ in range(TRIES):
            others = [ref for ref in self.samples[draw.randrange(len(self.samples))].images if ref.key not in own]
            if others:
                share = draw.betavariate(self.spec.alpha, self.spec.alpha)
                images = tuple(MixedPicture(ref, others[n % len(others)], share) for n, ref in enumerate(sample.images))
                return replace(sample, images=images)
        return sample  # all pictures are the same
