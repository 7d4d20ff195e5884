"""Other views of the same pictures: cropped and recoloured copies of samples, which both towers see alike."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageEnhance
from pydantic import Field

from mmkd.base.schema import Strict
from mmkd.data.lazy import is_lazy
from mmkd.data.samples import ImageRef, Sample
from mmkd.errors import DataError

_VIEW = re.compile(r"(.*) view \d+", re.DOTALL)


class ViewsSpec(Strict):
    """Puts copies of each sample with a picture beside it, with other views of the picture; the answer stays.

    For the sampler `hard_views` (HARD, arXiv 2305.14890), which takes one of them; without it each is a sample of its own. What a
    view may do is our choice: where the answer depends on the edge of a picture or on colours, leave them as they are.
    """

    copies: int = Field(3, ge=1, le=100)  # of each sample, beside itself
    crop: float = Field(0.8, gt=0, le=1)  # least side of the part that is seen, as a share; 1: the whole
    colour: float = Field(0.2, ge=0, lt=1)  # how far brightness, contrast and saturation may be from 1


@dataclass(frozen=True)
class ViewedPicture:
    """A part of a picture in the whole's size, with other colours. A `mmkd.towers.samples.Picture`.

    box: left, top, right, bottom in shares.  colours: factors of brightness, contrast and saturation.
    """

    own: ImageRef
    box: tuple[float, float, float, float]
    colours: tuple[float, float, float]
    file: Any = None  # what is read is not the file's own picture

    @property
    def name(self) -> str:
        return f"{self._how} {self.own.name}"

    @property
    def key(self) -> str:
        return f"{self._how} {self.own.key}"

    @property
    def _how(self) -> str:
        return " ".join(f"{value:.4f}" for value in (*self.box, *self.colours))

    def exists(self) -> bool:
        return self.own.exists()

    def read_bytes(self) -> bytes:
        return self._how.encode() + self.own.read_bytes()

    def load(self) -> Image.Image:
        """Raises ImageError where the picture cannot be read."""
        picture = self.own.load()
        if self.box != (0.0, 0.0, 1.0, 1.0):
            box = tuple(share * side for share, side in zip(self.box, picture.size * 2, strict=True))
            picture = picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)
        for enhance, by in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), self.colours, strict=True):
            picture = picture if by == 1 else enhance(picture).enhance(by)
        return picture


def with_views(samples: Sequence[Sample], spec: ViewsSpec | None, seed: int) -> Sequence[Sample]:
    """Each sample and, behind it, its copies ("ID view 1", ...). What they show follows from seed and id alone.

    Raises DataError for data that are too large to be read at once.
    """
    if spec is None:
        return samples
    if is_lazy(samples):
        raise DataError("data.views: these data are too large to have copies beside them; give a `limit`")
    found = []
    for sample in samples:
        found.append(sample)
        if sample.images:
            found += [_view(sample, number, spec, seed) for number in range(1, spec.copies + 1)]
    return found


def seen_of(sample_id: str) -> str:
    """The id of the sample that a view is of; of any other sample its own."""
    found = _VIEW.fullmatch(sample_id)
    return found[1] if found else sample_id


def _view(sample: Sample, number: int, spec: ViewsSpec, seed: int) -> Sample:
    digest = hashlib.blake2b(f"views {seed} {sample.id} {number}".encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(digest, "big"))
    images = []
    for ref in sample.images:
        wide, high = (draw.uniform(spec.crop, 1.0) for _ in range(2))
        left, top = draw.uniform(0, 1 - wide), draw.uniform(0, 1 - high)
        colours = tuple(draw.uniform(1 - spec.colour, 1 + spec.colour) for _ in range(3))
        images.append(ViewedPicture(ref, (left, top, min(1.0, left + wide), min(1.0, top + high)), colours))
    return replace(sample, id=f"{sample.id} view {number}", images=tuple(images))
