"""Samples of which student and teacher together are sure, of each answer alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mmkd.data.samplers.scored import ByScores, Chosen
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.registry import register


@register("samplers", "joint_confidence")
@dataclass(frozen=True)
class JointConfidence(ByScores):
    """Of each likeliest answer the samples of which student and teacher together are surest (KD3, arXiv 2307.11469).

    Each once an epoch: for pictures without labels, whose question is a probe and whose answers are the teacher's (`target:
    teacher`).

    share: of the samples with the same likeliest first word that are kept, rounded up. Sureness is the mean of both models'
    probabilities of it. Our reading of an abstract; a stage chooses once, as the student begins it: several stages, or `rounds`,
    choose anew.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def needs(self) -> tuple[str, ...]:
        return ("probabilities", "teacher_probabilities")

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Chosen:
        found = self.values(samples)
        places = surest((found["probabilities"] + found["teacher_probabilities"]) / 2, self.share)
        if len(places) < batch_size:
            raise DataError(f"sampler.share: {len(places)} samples are kept, fewer than batch_size {batch_size}; raise it")
        return Chosen(places, seed)


def surest(probabilities: np.ndarray, share: float) -> list[int]:
    """Places of the samples [N, C] that are kept: of each likeliest class the surest share, of equal ones the first."""
    likeliest, sure = probabilities.argmax(1), probabilities.max(1)
    found: list[int] = []
    for word in np.unique(likeliest):
        own = np.flatnonzero(likeliest == word)
        found += own[np.argsort(-sure[own], kind="stable")[: math.ceil(share * len(own) - 1e-9)]].tolist()
    return sorted(found)
