"""Checks: which answers become training rows. Each has a name, looks at the answers to one prompt, and says why one is dropped.

A check is one dataclass; its fields are the options that a recipe or card may set. A user's own stands in a module that the
recipe names by `imports:`:

    @register("checks", "polite")
    @dataclass
    class Polite(Check):
        '''Answers that say please.'''

        def refuse(self, one):
            return None if "please" in one.row["answer"] else "does not say please"

and is used by `checks: [polite]` in a write stage or a prompt card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkd.base.plugged import Plugged
from mmkd.data.samples import Question


@dataclass
class Candidate:
    """An answer that may become a training row.

    question: what was asked about.  author: who answered.  text: the answer as it came.  written: what was read from it.
    row: {question, answer, choices, ...} as it would be trained.  pictures: of the row.  notes: what checks found out, which is
    written beside the row.
    """

    id: str
    question: Question
    author: str
    number: int
    text: str
    written: Any
    row: dict[str, Any]
    pictures: tuple[Any, ...] = ()
    sample: Any = None  # as the author was asked
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """What checks may use of the run that they stand in.

    benchmarks: by name the questions of the benchmarks that the recipe scores and chooses on; `questions_of` gives those of
    any other.  scorer: by names of a metric and a parser a function (answer, question) -> 0.0 to 1.0.  authors: of the stage.
    """

    benchmarks: Mapping[str, Callable[[], Sequence[Question]]] = field(default_factory=dict)
    questions_of: Callable[[str], Sequence[Question]] | None = None
    scorer: Callable[[str, str], Callable[[str, Question], float | None]] | None = None
    authors: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()  # names that can be asked: the recipe's teachers


class Check:
    """One check. Subclasses are dataclasses."""

    asks: ClassVar[bool] = False  # whether it has questions of its own for a model (see `request`)

    def prepare(self, around: Surroundings) -> None:
        """Before anything is asked. Raises DataError for options that do not fit the run."""

    def start(self) -> None:
        """A pass over all answers begins, in the order of the data."""

    def refuse(self, one: Candidate) -> str | None:
        """Why an answer is dropped; None for one that stays."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `refuse`")

    def group(self, candidates: Sequence[Candidate]) -> list[str | None]:
        """The same for all answers to one prompt that are left."""
        return [self.refuse(one) for one in candidates]


class CheckSpec(Plugged):
    """An entry of `checks:`."""

    of: ClassVar[str] = "checks"
    one: ClassVar[str] = "check"


def names_of(checks: Iterable[CheckSpec]) -> list[str]:
    """A name for each of some checks: its kind, numbered where it is there more than once."""
    found: list[str] = []
    for check in checks:
        count = sum(name.split(" ")[0] == check.kind for name in found)
        found.append(check.kind if not count else f"{check.kind} {count + 1}")
    return found
