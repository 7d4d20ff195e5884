"""Samplers that choose by what models say of each sample: a run asks them before the stage, once."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import Sampler

from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.errors import DataError, one_line
from mmkd.registry import register


@dataclass(frozen=True)
class ByScores(SampleOrder):
    """scores: a file of JSON lines, {"id": ..., NAME: value} a sample; by default a run writes it before the stage."""

    scores: str = ""

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The values that a sample must have: "teacher", "student" and "reference" are mean cross-entropies of its answer;
        "teacher_blind" without its pictures; "margin" how much likelier the student's first word is than its second choice,
        "probabilities" its distribution over first words, "teacher_probabilities" the teacher's; "tries" and "teacher_tries" how
        many answers were drawn up to the right one, one more than were drawn where none was."""

    @property
    def how(self) -> dict[str, Any]:
        """What else the values depend on."""
        return {}

    @property
    def of_teacher(self) -> bool:
        """Whether a control without a teacher cannot have it."""
        return any(name.startswith("teacher") for name in self.needs)

    def values(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """By name the values of the samples, in their order. Raises DataError where some are missing."""
        if not self.scores:
            raise DataError("sampler.scores: the samples have no scores yet; they are made in a run, or name a file of them")
        known = {}
        try:
            for line in Path(self.scores).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                known[row["id"]] = row
            return {name: np.array([known[sample.id][name] for sample in samples], dtype=np.float64) for name in self.needs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            lacks = f"{self.scores} lacks {', '.join(self.needs)} of some sample ({one_line(error, 80)})"
            raise DataError(f"sampler.scores: {lacks}") from error


class Chosen(Sampler[int]):
    """Some of the samples, each once an epoch, in an order that follows from seed and epoch alone."""

    def __init__(self, places: Sequence[int], seed: int):
        self.places, self.seed, self.epoch = torch.tensor(sorted(places), dtype=torch.long), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from self.places[torch.randperm(len(self.places), generator=generator)].tolist()


class Drawn(Sampler[int]):
    """As many draws an epoch as there are samples, with given chances. The order follows from seed and epoch alone."""

    def __init__(self, chances: np.ndarray, seed: int):
        self.chances, self.seed, self.epoch = torch.from_numpy(chances), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.chances)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.multinomial(self.chances, len(self), replacement=True, generator=generator).tolist()


def _count(share: float, of: int, batch_size: int) -> int:
    """Samples that are kept, at least a batch of them. Raises DataError."""
    count = round(share * of)
    if count < batch_size:
        raise DataError(f"sampler.share: {share:g} of {of} samples are {count}, fewer than batch_size {batch_size}; raise it")
    return count


@register("samplers", "difference")
@dataclass(frozen=True)
class Difference(ByScores):
    """The samples on which the teacher is furthest ahead of a reference (MiniPLM, arXiv 2410.17215), each once an epoch.

    share: of the samples that are kept.  reference: a model; "" for the student as the stage begins.  grounding: weight of what
    the teacher's picture is worth to it, its loss without pictures less that with them: our third term, 0 is MiniPLM.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    reference: str = ""
    grounding: Annotated[float, Field(ge=0, le=1e3)] = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        blind = ("teacher_blind",) if self.grounding else ()
        return ("teacher", "reference" if self.reference else "student", *blind)

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Chosen:
        found = self.values(samples)
        scores = found["reference" if self.reference else "student"] - found["teacher"]
        if self.grounding:
            scores = scores + self.grounding * (found["teacher_blind"] - found["teacher"])
        return Chosen(largest(scores, _count(self.share, len(samples), batch_size)), seed)


def largest(scores: np.ndarray, count: int) -> list[int]:
    """Places of the `count` largest scores, of equal ones the first."""
    return np.argsort(-scores, kind="stable")[:count].tolist()


@register("samplers", "robust_active")
@dataclass(frozen=True)
class RobustActive(ByScores):
    """Samples drawn where the student is unsure, spread as far as the teacher may be wrong (Robust Active Distillation,
    arXiv 2210.01213).

    wrong: the share of samples on which the teacher may be wrong, wherever that hurts most; 0 draws the least margin alone.
    """

    wrong: Annotated[float, Field(ge=0, le=1)] = 0.1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("margin",)

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Drawn:
        gains = 1 - self.values(samples)["margin"]
        return Drawn(robust_chances(gains, round(self.wrong * len(samples))), seed)


def robust_chances(gains: np.ndarray, errors: int) -> np.ndarray:
    """The chances p that make the least value of sum p_i g_i largest, where any `errors` of the gains g may be nothing. [N]

    Chances are as 1 / g_i on the j largest gains and 0 elsewhere, where the j makes (j - errors) / sum of 1 / g_i largest: then
    no error hurts more than another. With as many errors as samples nothing is gained anywhere, and all are as likely.
    """
    count = len(gains)
    if errors >= count:
        return np.full(count, 1 / count)
    order = np.argsort(-gains, kind="stable")
    inverse = 1 / np.maximum(gains[order], 1e-9)
    value = (np.arange(1, count + 1) - errors) / np.cumsum(inverse)  # by j
    best = int(np.argmax(value)) + 1
    chances = np.zeros(count)
    chances[order[:best]] = inverse[:best] / inverse[:best].sum()
    return chances


@register("samplers", "pcoreset")
@dataclass(frozen=True)
class PCoreSet(ByScores):
    """Samples that cover what the student says: k-centres in the space of its first-word probabilities (PCoreSet,
    arXiv 2506.00910), each once an epoch.

    labelled: data entries, from the first, that are in from the beginning.  share: of the other samples that are added.
    """

    labelled: Annotated[int, Field(ge=0)] = 1
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def needs(self) -> tuple[str, ...]:
        return ("probabilities",)

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Chosen:
        if self.labelled > len(sizes):
            raise DataError(f"sampler.labelled is {self.labelled}, of {len(sizes)} data entries")
        first = sum(sizes[: self.labelled])
        found = self.values(samples)["probabilities"]
        return Chosen(centres(found, list(range(first)), round(self.share * (len(samples) - first))), seed)


def centres(points: np.ndarray, chosen: Sequence[int], count: int) -> list[int]:
    """`chosen` and `count` more places, each the furthest from all chosen before it; the first of equal ones. points [N, D]"""
    found = list(chosen)
    nearest = np.full(len(points), np.inf)
    for place in found:
        nearest = np.minimum(nearest, np.linalg.norm(points - points[place], axis=1))
    nearest[found] = -np.inf
    for _ in range(count):
        place = int(np.argmax(nearest))
        found.append(place)
        nearest = np.minimum(nearest, np.linalg.norm(points - points[place], axis=1))
        nearest[place] = -np.inf
    return found
