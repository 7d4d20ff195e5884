"""What the towers make of a stage's data: lengths, samples that cannot be used, pictures that are not there. Before training.

Small data sets are looked at whole, large ones by samples that are spread over them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmkd.data.entries import layout_of
from mmkd.data.lazy import is_lazy
from mmkd.data.samples import Sample
from mmkd.data.spec import DataSpec
from mmkd.errors import MmkdError
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term
from mmkd.towers.tower import Encoded, Tower
from mmkd.train.batch import Pair
from mmkd.train.collate import PairDataset, encode_whole
from mmkd.train.preference import PreferenceDataset
from mmkd.train.skips import LEFT_OUT, Skip, in_words

LOOKED_AT = 512  # samples of a data entry that are prepared
AT_START = 32  # when a run is to begin: it counts by itself what it leaves out
SECONDS, SECONDS_OF_LARGE = 10.0, 4.0  # how long that may take, where they are all samples of the entry, and else
AGAIN = 3  # samples of an entry that another stage has, too
PICTURES = 4096  # samples of a large set whose pictures are looked for; of others all
SURE = 2.326  # of the normal distribution: one time in a hundred a bound is wrong
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Lengths:
    """Of the samples that were looked at, how long they are for one tower. over: how many are longer than `max_length`."""

    max_length: int
    tokens: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)

    @property
    def over(self) -> int:
        return sum(count > self.max_length for count in self.tokens)

    def add(self, tower: Tower, encoded: Encoded) -> None:
        self.tokens.append(len(encoded.input_ids))
        self.visual.append(tower.visual_count(encoded))

    def __str__(self) -> str:
        low, middle, most, high = (round(float(q)) for q in np.quantile(self.tokens, (0, 0.5, 0.95, 1)))
        pictured = [count for count in self.visual if count] or [0]
        return (
            f"tokens {low:,} to {high:,} {_bars(self.tokens)} median {middle:,}, 95 % {most:,}; visual {min(pictured):,} to "
            f"{max(pictured):,}; {self.over or 'none'} over max_length {self.max_length:,}"
        )


def _bars(values: Sequence[int]) -> str:
    """A histogram in eight characters."""
    counts, _ = np.histogram(values, bins=8)
    return "".join(BARS[-(-int(count) * 7 // max(1, int(counts.max())))] for count in counts)


@dataclass
class Survey:
    """What was found in one data entry. tried: samples that were prepared.  missing: samples without a picture that they name."""

    name: str
    samples: int
    tried: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    searched: int = 0
    missing: int = 0
    first_missing: str = ""
    layout: str = ""
    misread: str = ""  # the first sample whose targets are not its answers
    error: str = ""

    @property
    def left_out(self) -> float:
        """How many samples of the entry cannot be used, as far as was seen."""
        tried = len(self.skips) / self.tried if self.tried else 0.0
        missing = self.missing / self.searched if self.searched else 0.0
        return max(tried, missing) * self.samples

    @property
    def surely_left_out(self) -> float:
        """How many of them at least, by what the samples that were looked at show: one bad one of 64 does not make 1.6 %."""
        return max(_at_least(len(self.skips), self.tried, self.samples), _at_least(self.missing, self.searched, self.samples))

    def lines(self) -> list[str]:
        seen = "all prepared" if self.tried == self.samples else f"{self.tried:,} of them prepared"
        found = [f"  data {self.name}: {self.samples:,} samples, {seen}"]
        found += [f"    {role:<8} {lengths}" for role, lengths in self.lengths.items() if lengths.tokens]
        return found + [f"    {problem}" for problem in self.problems()]

    def problems(self) -> list[str]:
        """What cannot be used, in words."""
        found = []
        if self.missing:
            found.append(
                f"pictures are not there: those of {self.missing:,} of {self.searched:,} samples, the first is "
                f"{self.first_missing}. Looked for is {self.layout}"
            )
        if self.skips:
            found.append(
                f"{len(self.skips):,} of {self.tried:,} samples cannot be used: {in_words(self.skips)}. The first: "
                f"{self.skips[0].message}"
            )
        if self.misread:
            found.append(f"{self.misread}; the tokenizer does not keep the words")
        return found


def _at_least(found: int, looked_at: int, of: int) -> float:
    """How many of `of` there are if `found` of some that were drawn are: the lower bound of Wilson's interval."""
    if not found or looked_at >= of:
        return found
    share, square = found / looked_at, SURE**2 / looked_at
    low = (share + square / 2 - (square * (share * (1 - share) + square / 4)) ** 0.5) / (1 + square)
    return max(found, low * of)


def unseen(spec: DataSpec, samples: Sequence[Sample]) -> Survey:
    """A data entry of which nothing can be prepared yet."""
    return Survey(_called(spec), len(samples), layout=layout_of(spec))


def _called(spec: DataSpec) -> str:
    if spec.from_ is not None:
        return f"from {spec.from_}" + ("" if spec.root else ", before it is written")
    return spec.card or f"{spec.format} {spec.root}"


def look(
    spec: DataSpec, samples: Sequence[Sample], student: Tower, teachers: Mapping[str, Teacher], terms: Sequence[Term],
    known: Survey | None = None, most: int = LOOKED_AT,
) -> Survey:  # fmt: skip
    """Looks at one data entry. known: what was found of the same entry for another stage.  most: samples that are prepared."""
    found = Survey(_called(spec), len(samples), layout=layout_of(spec))
    kind = PreferenceDataset if any(t.needs_pairs for t in terms) else PairDataset
    try:
        _look_for_pictures(found, samples)
        places = _spread(len(samples), AGAIN if known else most)
        seconds = SECONDS if len(places) == len(samples) else SECONDS_OF_LARGE
        _prepare(found, kind([samples[place] for place in places], student, teachers, terms, memory=0), places, seconds)
    except MmkdError as error:
        found.error = str(error)
    if known is not None and not found.error and not found.skips:
        found.tried, found.lengths, found.skips = known.tried, known.lengths, known.skips
    return found


def _spread(count: int, most: int) -> list[int]:
    """Places of at most `most` of `count` samples; the first ones of these are spread over all, too."""
    return random.Random(0).sample(range(count), min(count, most))


def _look_for_pictures(found: Survey, samples: Sequence[Sample]) -> None:
    there: dict[str, bool] = {}
    for place in sorted(_spread(len(samples), PICTURES if is_lazy(samples) else len(samples))):
        found.searched += 1
        absent = ""
        for ref in samples[place].images:
            if ref.key not in there:
                there[ref.key] = ref.exists()
            absent = absent or ("" if there[ref.key] else ref.key)
        found.missing += bool(absent)
        found.first_missing = found.first_missing or absent


def _prepare(found: Survey, dataset: PairDataset, places: Sequence[int], seconds: float) -> None:
    """places: of the data set's samples in the entry."""
    towers = readers(dataset)
    found.lengths = {role: Lengths(tower.max_length) for role, tower in towers.items()}
    started = time.monotonic()
    for number, place in enumerate(places):
        if found.tried >= AGAIN and time.monotonic() - started > seconds:
            break
        pair = dataset.look(number)
        found.tried += 1
        if isinstance(pair, Skip):
            found.skips.append(replace(pair, index=place))
        for role, tower in towers.items():
            encoded = whole(tower, dataset.samples[number], of_role(pair, role))
            if encoded is not None:
                found.lengths[role].add(tower, encoded)
                found.misread = found.misread or tower.preparer.misread(dataset.samples[number], encoded) or ""


def readers(dataset: PairDataset) -> dict[str, Tower]:
    """The towers that read the samples of a data set: the student, and the teachers that are not stored."""
    return {"student": dataset.student, **{n: t.body for n, t in dataset.teachers.items() if not t.stored}}


def of_role(pair: Pair | Skip, role: str) -> Encoded | None:
    """A sample as the student or a teacher reads it; None where it is left out."""
    if isinstance(pair, Skip):
        return None
    return pair.student if role == "student" else pair.teachers[role].inputs


def whole(tower: Tower, sample: Sample, encoded: Encoded | None) -> Encoded | None:
    """A sample as long as it is; None where it cannot be prepared."""
    if encoded is not None and not encoded.truncated:
        return encoded
    try:
        return encode_whole(tower, sample)
    except LEFT_OUT:
        return None
