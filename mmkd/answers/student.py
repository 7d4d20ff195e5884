"""The student's own answers: on-policy training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmkd.answers import Asked, GeneratedAnswers
from mmkd.registry import register
from mmkd.towers.sampling import Sampling, sample
from mmkd.towers.tower import Tower


@register("answers", "student")
class StudentAnswers(GeneratedAnswers):
    """Answers that the student gives as it is before the step: on-policy (GKD, arXiv 2306.13649)."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1, le=2**16)] = 128

    def answer(self, student: Tower, asked: Sequence[Asked]) -> list[list[int]]:
        how = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
        return sample(student, [(one.prompt, one.pictures) for one in asked], [one.seed for one in asked], how)
