"""A judge: a model that is asked whether a row is right, by the odds of its yes and no."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError, did_you_mean
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check, Surroundings
from mmkd.writing.templates import compiled, filled

PROMPT = (
    "Question: {{ question }}\n{% if choices %}Choices: {{ choices | join('; ') }}\n{% endif %}Proposed answer: {{ answer }}\n"
    "Is the proposed answer right? Answer yes or no."
)


@register("checks", "judge")
@dataclass
class Judge(Check):
    """Keeps rows that a model of the recipe judges right: log p(yes) - log p(no) of its first word is at least `at_least`.

    by: a teacher's name.  prompt: a template of the row's question, answer and choices.  yes, no: the two words.
    keep: the key of the row's `told` under which the odds are kept (as the term `aspects` reads them); "" keeps none.
    """

    asks: ClassVar[bool] = True

    by: str = "teacher"
    at_least: float = 0.0
    prompt: str = PROMPT
    yes: str = "yes"
    no: str = "no"
    keep: str = ""

    def __post_init__(self) -> None:
        compiled(self.prompt)
        if self.yes == self.no:
            raise ValueError("yes and no are the same word")

    def prepare(self, around: Surroundings) -> None:
        if self.by not in around.judges:
            raise DataError(f"judge.by: there is no teacher {self.by!r}; {did_you_mean(self.by, around.judges)}")

    @property
    def options(self) -> tuple[str, str]:
        """The answers whose odds are asked for."""
        return self.yes, self.no

    def request(self, one: Candidate) -> Sample:
        """What the judge is asked of a row. Raises DataError."""
        text = filled(self.prompt, {"choices": [], **one.row})
        return Sample(f"{one.id} judged", tuple(one.pictures), (Turn("user", text, len(one.pictures)),))

    def told(self, one: Candidate, odds: float | None) -> Candidate:
        """The row with the judge's log-odds; None where it gave none."""
        more = {self.keep: repr(odds)} if self.keep and odds is not None else {}
        row = {**one.row, "told": {**one.row.get("told", {}), **more}}
        return replace(one, row=row, notes={**one.notes, "odds": odds})

    def refuse(self, one: Candidate) -> str | None:
        odds = one.notes.get("odds")
        if odds is None:
            return "not judged"
        return None if odds >= self.at_least else "judged wrong"
