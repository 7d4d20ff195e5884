"""Do pictures matter? Samples are prepared once more, with the pictures of other samples in the place of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmkd.data.samples import Sample
from mmkd.errors import MmkdError
from mmkd.towers.samples import Picture
from mmkd.towers.tower import Encoded, Tower

TRIES = 4  # other pictures that are tried for one sample
PROBED = 4  # samples whose rows are compared bit for bit


@dataclass
class Exchange:
    """Samples with other samples' pictures.

    places: which of the given samples they are.  other: each prepared with other pictures at these pictures' own size, as they
    would be met.  probe: of some samples (own, with other pixels), both with the same tokens: other pictures are brought to the
    size of the sample's own where that is needed.
    """

    places: list[int] = field(default_factory=list)
    other: list[Encoded] = field(default_factory=list)
    probe: list[tuple[Encoded, Encoded]] = field(default_factory=list)


def exchanged(
    tower: Tower, samples: Sequence[Sample], encoded: Sequence[Encoded], probes: int | None = None
) -> Exchange:
    """The samples with a picture, each with pictures of others; those for which none is found are left out.

    encoded: the samples as the tower prepares them.  probes: ends as soon as it has so many, where nothing else is asked for.
    Pictures with the same pixels are no exchange, nor is one with which a sample
    would not fit into the tower's `max_length`.
    """
    pool = list({ref.key: ref for sample in samples for ref in sample.images}.values())
    found = Exchange()
    for place, (sample, own) in enumerate(zip(samples, encoded, strict=True)):
        for refs in _others(sample, pool, start=place):
            other = _prepared(tower, sample, own, refs)
            if other is None:
                continue
            found.places.append(place)
            found.other.append(other)
            if len(found.probe) < (probes or PROBED) and (alike := _alike(tower, sample, own, refs, other)) is not None:
                found.probe.append((own, alike))
            break
        if len(found.probe) == probes:
            break
    return found


def _others(sample: Sample, pool: Sequence[Picture], start: int) -> Iterator[list[Picture]]:
    """Other pictures for a sample's, in several ways; none where the pool holds no others."""
    own = {ref.key for ref in sample.images}
    others = [ref for ref in [*pool[start:], *pool[:start]] if ref.key not in own] if own else []
    for shift in range(min(TRIES, len(others))):
        yield [others[(shift + k) % len(others)] for k in range(len(sample.images))]


def _prepared(
    tower: Tower, sample: Sample, own: Encoded, refs: Sequence[Picture], sizes: Sequence[tuple[int, int]] | None = None
) -> Encoded | None:
    """The sample with these pictures, of their own size or of `sizes` (width, height); None where that cannot be done or
    changes nothing."""
    try:
        pictures = [ref.load() for ref in refs]
        if sizes is not None:
            pictures = [picture.resize(size) for picture, size in zip(pictures, sizes, strict=True)]
        other = tower.encode(sample, pictures=pictures)
    except MmkdError:  # a picture that cannot be read, or with which the sample is too long: another will do
        return None
    return None if _same(own.pixels, other.pixels) or not bool((other.targets >= 0).any()) else other


def _alike(tower: Tower, sample: Sample, own: Encoded, refs: Sequence[Picture], other: Encoded) -> Encoded | None:
    """The sample with the pixels of other pictures and the tokens of its own; None where its processor does not allow it."""
    if not _same_layout(own, other):
        other = _prepared(tower, sample, own, refs, [ref.load().size for ref in sample.images])
    return other if other is not None and _same_layout(own, other) else None


def _same_layout(own: Encoded, other: Encoded) -> bool:
    """Whether all but the values of pixels is the same; whole numbers are grids, which tokens are placed by."""
    pairs = [(tensor, other.pixels.get(name)) for name, tensor in own.pixels.items()]
    return torch.equal(own.input_ids, other.input_ids) and all(
        b is not None and a.shape == b.shape and (a.is_floating_point() or torch.equal(a, b)) for a, b in pairs
    )


def _same(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
