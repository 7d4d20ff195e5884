"""Of each sample the view on which the student is furthest from a teacher that stays with what it said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mmkd.data.samplers.scored import ByScores, Chosen
from mmkd.data.samples import Sample
from mmkd.data.views import seen_of
from mmkd.errors import DataError
from mmkd.registry import register


@register("samplers", "hard_views")
@dataclass(frozen=True)
class HardViews(ByScores):
    """Of each sample's views (`views` of a data entry) the one that is hard for the student and that the teacher holds alike.

    It is the largest KL(teacher on the view, student on it) - stability * KL(teacher on the picture, teacher on the view), over
    first words; of equal ones the picture itself (HARD, arXiv 2305.14890). Each once an epoch.

    stability: 0 looks at the disagreement alone; the larger, the more samples stay as they are. Our reading of an abstract:
    among drawn views, chosen once as the stage begins, in place of an augmenter that is trained in turn with the student; several
    stages, or `rounds`, choose anew.
    """

    stability: Annotated[float, Field(ge=0)] = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("probabilities", "teacher_probabilities")

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Chosen:
        found = self.values(samples)
        groups: dict[str, list[int]] = {}
        for place, sample in enumerate(samples):
            groups.setdefault(seen_of(sample.id), []).append(place)
        if len(groups) == len(samples):
            raise DataError("sampler hard_views: no sample has other views; give a data entry `views`, such as {copies: 3}")
        if len(groups) < batch_size:
            raise DataError(f"sampler hard_views: {len(groups)} samples have views, fewer than batch_size {batch_size}")
        student, teacher = found["probabilities"], found["teacher_probabilities"]
        return Chosen([hardest(teacher, student, places, self.stability) for places in groups.values()], seed)


def hardest(teacher: np.ndarray, student: np.ndarray, places: Sequence[int], stability: float) -> int:
    """The place of a sample's hardest view. teacher, student: probabilities [N, C].  places: of its views, the picture first."""
    own = [divergence(teacher[place], student[place]) for place in places]
    moved = [divergence(teacher[places[0]], teacher[place]) for place in places]
    return places[int(np.argmax(np.array(own) - stability * np.array(moved)))]


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p, q) in nats; probabilities below 1e-12 count as that. [C], [C]"""
    p, q = (np.clip(one, 1e-12, None) for one in (p, q))
    return float((p * np.log(p / q)).sum())
