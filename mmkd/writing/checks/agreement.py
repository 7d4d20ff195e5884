"""Checks that compare answers to one prompt with one another, or with what the data say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mmkd.errors import DataError
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check, Surroundings
from mmkd.writing.words import folded, spaced


@register("checks", "majority")
@dataclass
class Majority(Check):
    """Keeps answers that most answers to the same prompt agree with, up to case and punctuation.

    share: of all answers that were asked for, dropped ones among them, that must agree; a tie keeps none.  keep: the first of
    those that agree, or all.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    keep: Literal["first", "all"] = "first"
    least: Annotated[int, Field(ge=1)] = 1  # answers that must agree

    def group(self, candidates: Sequence[Candidate]) -> list[str | None]:
        votes = Counter(folded(one.row["answer"]) for one in candidates)
        ranked = votes.most_common(2)
        if not ranked:
            return []
        asked = max(one.notes.get("asked", len(candidates)) for one in candidates)
        (winner, count), tied = ranked[0], len(ranked) > 1 and ranked[0][1] == ranked[1][1]
        if tied or count < max(self.least, self.share * asked):
            return ["no majority"] * len(candidates)
        found: list[str | None] = []
        for one in candidates:
            if folded(one.row["answer"]) != winner:
                found.append("not the majority's")
            else:
                again = self.keep == "first" and None in found
                found.append("the majority's again" if again else None)
                one.notes["votes"] = f"{count} of {asked}"
        return found


@register("checks", "agreement")
@dataclass
class Agreement(Check):
    """Keeps a prompt's answers where all authors of the stage gave the same one, up to case and punctuation; of each author its
    most frequent answer counts. The first author's answer stays."""

    def prepare(self, around: Surroundings) -> None:
        if len(around.authors) < 2:
            raise DataError("agreement: one author agrees with itself; name several in `by`")
        self._authors = around.authors

    def group(self, candidates: Sequence[Candidate]) -> list[str | None]:
        votes: dict[str, Counter[str]] = {name: Counter() for name in self._authors}
        for one in candidates:
            votes[one.author][folded(one.row["answer"])] += 1
        said = [counts.most_common(1)[0][0] if counts else None for counts in votes.values()]
        if None in said:
            return ["an author gave no answer"] * len(candidates)
        if len(set(said)) > 1:
            return ["the authors disagree"] * len(candidates)
        first = next(n for n, one in enumerate(candidates) if folded(one.row["answer"]) == said[0])
        return [None if n == first else "agreed with" for n in range(len(candidates))]


@register("checks", "reference")
@dataclass
class Reference(Check):
    """Compares answers with the data's own: `is: contained` keeps those in which one of its answers stands, as whole words;
    `equal`, `absent` (none stands in it) and `different` are the others.

    Two stages with `contained` by the teacher and `absent` by the student are MPA's parity filter.
    """

    be: Literal["contained", "equal", "absent", "different"] = "contained"

    def refuse(self, one: Candidate) -> str | None:
        wanted = references_of(one)
        if not wanted:
            return "no reference"
        answer = said_by(one)
        if self.be in ("contained", "absent"):
            there = any(spaced(reference) in spaced(answer) for reference in wanted)
        else:
            there = folded(answer) in map(folded, wanted)
        if there == (self.be in ("contained", "equal")):
            return None
        return "another answer than the data's" if not there else "the data's answer"


def references_of(one: Candidate) -> tuple[str, ...]:
    """The data's answers to a question, in words."""
    question = one.question
    if question.choices and question.answer_index is not None:
        return (question.choices[question.answer_index],)
    return question.references or tuple(filter(None, [question.answer]))


def said_by(one: Candidate) -> str:
    """The author's own answer: what the form read as its answer, whatever the row is made of."""
    written: Any = one.written
    if isinstance(written, dict):
        return str(written.get("answer", one.row["answer"]))
    return str(written)


@register("checks", "scored")
@dataclass
class Scored(Check):
    """An official scorer as verifier: keeps answers that it scores from `at_least` to `at_most` against the data's own.

    metric and parser: names of `mmkd list metrics` and `mmkd list parsers`.
    """

    metric: str = "exact_match"
    parser: str = "identity"
    at_least: Annotated[float, Field(ge=0, le=1)] = 1.0
    at_most: Annotated[float, Field(ge=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least is {self.at_least}, above at_most {self.at_most}")

    def prepare(self, around: Surroundings) -> None:
        if around.scorer is None:
            raise DataError("scored: there are no scorers here")
        self._score = around.scorer(self.metric, self.parser)

    def refuse(self, one: Candidate) -> str | None:
        if not references_of(one):
            return "no reference"
        score = self._score(said_by(one), one.question)
        if score is None:
            return "not parsed"
        one.notes["score"] = round(score, 4)
        return None if self.at_least <= score <= self.at_most else "scored too " + ("low" if score < self.at_least else "high")
