"""The student's own answers, with a hint where none of them is right: KEPO's exploration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from mmkd.answers import Asked
from mmkd.answers.student import StudentAnswers
from mmkd.registry import register
from mmkd.teachers.view import View, ViewSpec
from mmkd.terms.reward import Scorer, question_of
from mmkd.towers.sampling import text_of
from mmkd.towers.tower import Tower

Answers = Sequence[list[int]] | Mapping[int, list[int]]  # token ids by place


@register("answers", "hinted")
class HintedAnswers(StudentAnswers):
    """Several answers to each prompt; where none is rewarded, new ones with a hint in the prompt (KEPO, arXiv 2602.00400).

    hint: a template as of `teacher.prompt`, such as "{prompt}\\nHint: {hint}"; the words may be a teacher's (`mmkd write`).
    The answers of the first try with one that is rewarded take the place of all, behind the prompt without the hint. Our
    choice: at most `tries`, rewarded is what scores `threshold`, and no importance weight.
    """

    samples: Annotated[int, Field(ge=1, le=1024)] = 8
    hint: str
    tries: Annotated[int, Field(ge=0, le=64)] = 2
    metric: str = "exact_match"
    parser: str = "identity"
    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0

    @field_validator("hint")
    @classmethod
    def _readable(cls, given: str) -> str:
        return ViewSpec.readable(given)

    @model_validator(mode="after")
    def _known(self) -> HintedAnswers:
        if wrong := Scorer(self.metric, self.parser).errors():
            raise ValueError("; ".join(wrong))
        return self

    def answer(self, student: Tower, asked: Sequence[Asked]) -> list[list[int]]:
        found = super().answer(student, asked)
        groups = [list(places) for _, places in groupby(range(len(asked)), key=lambda n: asked[n].sample.id)]
        failed = [places for places in groups if not self._is_rewarded(student, asked, found, places)]
        for turn in range(self.tries):
            if not failed:
                break
            again = [n for places in failed for n in places]
            answers = super().answer(student, [self._with_hint(student, asked[n], turn) for n in again])
            tried, left = dict(zip(again, answers, strict=True)), []
            for places in failed:
                if not self._is_rewarded(student, asked, tried, places):
                    left.append(places)
                    continue
                for n in places:
                    found[n] = tried[n]
            failed = left
        return found

    def _is_rewarded(self, student: Tower, asked: Sequence[Asked], answers: Answers, places: Sequence[int]) -> bool:
        scorer, question = Scorer(self.metric, self.parser), question_of(asked[places[0]].sample)
        texts = (text_of(student.tokenizer, answers[n]) for n in places)
        return any(scorer(text, question) >= self.threshold for text in texts)

    def _with_hint(self, student: Tower, one: Asked, turn: int) -> Asked:
        prompt = student.encode(View(self.hint)(one.sample), with_answer=False)
        return replace(one, prompt=prompt, seed=one.seed ^ (turn + 1))
