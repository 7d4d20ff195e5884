"""Samples by how hard they are: how many answers a model needs until one is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mmkd.data.samplers.scored import ByScores, Chosen
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.registry import register


@register("samplers", "difficulty")
@dataclass(frozen=True)
class Difficulty(ByScores):
    """The samples that a model does not answer rightly at once, each once an epoch (ThinkLite-VL, arXiv 2504.07934).

    by: who answers.  cap: answers that are drawn at most, at `temperature`, of `max_new_tokens`.  least: a sample is kept where
    the right answer was not among the first `least` - 1.  unsolved: whether those without a right answer are kept, too. Right is
    what equals the data's answer without case, punctuation and white space.
    Our choice: answers drawn one after another in the place of a tree search; cap and least (the paper's are not confirmed).
    """

    by: Literal["student", "teacher"] = "student"
    cap: Annotated[int, Field(ge=1, le=1024)] = 16
    least: Annotated[int, Field(ge=1, le=1024)] = 5
    unsolved: bool = True
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=2**16)] = 32

    @property
    def needs(self) -> tuple[str, ...]:
        return ("tries",) if self.by == "student" else ("teacher_tries",)

    @property
    def how(self) -> dict[str, Any]:
        return {"cap": self.cap, "temperature": self.temperature, "max_new_tokens": self.max_new_tokens}

    def build(self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int) -> Chosen:
        if self.least > self.cap + 1:
            raise DataError(f"sampler.least is {self.least}, but no more than {self.cap} answers are drawn; raise cap")
        tries = self.values(samples)[self.needs[0]]
        places = [n for n, number in enumerate(tries) if (self.unsolved if number > self.cap else number >= self.least)]
        if len(places) < batch_size:
            unsolved, soon = sum(tries > self.cap), sum(tries < self.least)
            raise DataError(
                f"sampler difficulty: of {len(samples)} samples {unsolved} stay unsolved and {soon} are solved within "
                f"{self.least - 1} answers; {len(places)} are left, fewer than batch_size {batch_size}. Lower sampler.least"
            )
        return Chosen(places, seed)
