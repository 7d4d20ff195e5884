"""Answer sources: where the answers that a training step learns from come from.

A step asks its source for micro-batches. `data` gives them as the data have them. A source that generates gives the tokens
of new answers to prompts; `mmkd.answers.mixed` deals the samples of a step out to the sources by their shares, and the stage puts
each answer behind its prompt and collates as ever, so that rows, targets and counts stay right.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, ValidationError

from mmkd.base.schema import Strict
from mmkd.errors import DataError, did_you_mean
from mmkd.registry import registry
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Schedule
from mmkd.towers.inputs import Encoded
from mmkd.towers.samples import Sample
from mmkd.towers.tower import Tower

Log = dict[str, tuple[float, float]]  # what goes into the log: name -> (sum, count)
FILE = "answers.json"  # of a checkpoint: what sources carry from step to step


@dataclass(frozen=True)
class Asked:
    """A prompt that is to be answered: as the student prepares it, what names its pictures, and a seed of its own.

    theirs: as each teacher prepares it.  sample: what it is the prompt of.
    """

    prompt: Encoded
    pictures: tuple[str, ...]
    seed: int
    theirs: Mapping[str, Encoded] = field(default_factory=dict)
    sample: Sample | None = None


class Memory(ABC):
    """What a source carries from step to step: a share that moves, answers that it gives again. Equal in every process.

    held_out: places of samples that are never trained on; the loss on them is measured each `every` steps.
    """

    held_out: frozenset[int]
    every: int

    @abstractmethod
    def share(self, progress: float) -> float:
        """The share of a step's samples that the source answers, 0..1."""

    @abstractmethod
    def recalled(self, place: float, draw: int, progress: float) -> tuple[int, list[int]] | None:
        """A sample's place and an answer to its prompt that was given before, in the place of a new answer; None for a new one.

        place: in 0..1, where in the share the sample came to lie.  draw: a whole number from 0, the sample's own.
        """

    @abstractmethod
    def keep(self, answers: Sequence[tuple[int, list[int]]]) -> None:
        """The new answers of a step, of all processes, in an order that does not depend on who gave them."""

    @property
    @abstractmethod
    def is_measured(self) -> bool:
        """Whether the loss was measured before."""

    @abstractmethod
    def measured(self, loss: float) -> None:
        """The mean loss of the student on the data's answers to `held_out`, before step 1 and each `every` steps."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint, as JSON has it."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""


class AnswerSource(ABC):
    """Gives the micro-batches of an optimiser step."""

    generates = False  # whether it makes answers that the data do not have
    memories: Mapping[str, Memory] = {}  # by source

    @abstractmethod
    def take(self, coming: Iterator[Any], count: int) -> list[Any]:
        """At most `count` micro-batches; fewer at the end of an epoch.

        coming: the loader's, each {"batch": Batch}, with the answers of the data.
        """

    def begin(self, step: int, progress: float) -> None:  # noqa: B027  most sources are the same at any time
        """Before `take`: the optimiser step that is to be made, from 0, and where in the stage that is, 0..1."""

    def observed(self) -> Log:
        """What the last `take` tells the log; the same names in every process."""
        return {}

    def save(self, folder: Path) -> None:
        """Into a checkpoint's folder."""
        if self.memories:
            state = {name: memory.state() for name, memory in self.memories.items()}
            (folder / FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises DataError for a checkpoint that lacks what a source carries."""
        try:
            state = json.loads((folder / FILE).read_text(encoding="utf-8")) if self.memories else {}
            for name, memory in self.memories.items():
                memory.restore(state[name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE} does not hold what `answers` carries; delete this checkpoint") from error


class GeneratedAnswers(Strict):
    """A source that generates. Subclasses are registered under "answers"; their fields are the options of a recipe."""

    own_share: ClassVar[bool] = False  # whether it finds its share itself, by a memory, and a recipe gives none

    of_pairs: ClassVar[bool] = False  # whether every sample must have a chosen and a rejected answer

    samples: Annotated[int, Field(ge=1, le=1024)] = 1  # answers to each prompt
    beside: bool = False  # the sample stays in the step with its answer of the data, too

    def memory(self, size: int, seed: int) -> Memory | None:
        """What it carries from step to step of a stage with `size` samples; None for nothing. Raises DataError."""
        return None

    def answer(self, student: Tower, asked: Sequence[Asked]) -> list[list[int]]:
        """An answer to each prompt, as ids of the student's tokenizer, its end token the last of one that came to its end."""
        raise TypeError(f"{type(self).__name__} has no answer")

    def needs(self, student: Tower, teachers: Mapping[str, Teacher]) -> list[str]:
        """Why it cannot answer in a stage with these teachers; asked before the first step."""
        return []

    def answer_beside(self, student: Tower, teachers: Mapping[str, Teacher], asked: Sequence[Asked]) -> list[list[int]]:
        """`answer`, for a source that a teacher has a part in."""
        return self.answer(student, asked)


class Stage(Protocol):
    """What a source is told by the stage that it works for (`mmkd.train.rollouts.Rollouts`)."""

    seed: int

    @property
    def size(self) -> int:
        """Samples of its data."""

    @property
    def student(self) -> Tower: ...
    @property
    def teachers(self) -> Mapping[str, Teacher]: ...
    def is_skip(self, pair: Any) -> bool:
        """Whether what the loader gave is a sample that is left out."""

    def pair(self, place: int) -> Any:
        """The sample at a place of the data, as the loader gives it."""

    def usable(self, pair: Any, held_out: frozenset[int]) -> Any:
        """The pair, or where it is held out the next that is not, and can be used."""

    def asked(self, pair: Any, seed: int) -> Asked:
        """The prompt of a pair that the loader gave."""

    def answered(self, pair: Any, ids: Sequence[int], draw: int) -> Any:
        """The pair with another answer to its prompt, or why it is left out."""

    def batch(self, pairs: Sequence[Any]) -> dict[str, Any]:
        """A micro-batch."""


# ---- shares ------------------------------------------------------------------------------------------------------------


def share_of(given: Any) -> Schedule | None:
    """The share in what a recipe gives a source: a number, or {start, end, over}, alone or as `share`; None where it has none."""
    if isinstance(given, Mapping) and "share" in given:
        given = given["share"]
    if isinstance(given, Mapping):
        wrong = set(given) - {"start", "end", "over"}
        if wrong or not {"start", "end"} <= set(given):
            return None
        return Schedule(float(given["start"]), float(given["end"]), float(given.get("over", 1.0)))
    return Schedule(float(given), float(given)) if isinstance(given, int | float) and not isinstance(given, bool) else None


def share_errors(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with a stage's `answers`."""
    known = registry("answers")
    wrong = [f"there is no answer source {name!r}; {did_you_mean(name, known)}" for name in given if name not in known]
    if wrong:
        return wrong
    own = {name: value for name, value in given.items() if _finds_share(name)}
    given_too = [name for name, value in own.items() if share_of(value) is not None or not isinstance(value, Mapping)]
    if given_too:
        return [f"{name} finds its share itself; take `share` out" for name in given_too]
    shares = {name: _share(name, value) for name, value in given.items()}
    wrong = [f"{name} needs a share: a number from 0 to 1, or {{start, end, over}}" for name, s in shares.items() if s is None]
    wrong += [error for name in given if (error := _option_error(name, given[name]))]
    if wrong:
        return wrong
    ends = [[at(place) for at in (s.at for s in shares.values())] for place in (0.0, 1.0)]
    moving = any(s.start != s.end for s in shares.values())
    if any(share < 0 for row in ends for share in row):
        return [f"the shares {dict(given)} must not be negative and add up to 1"]
    if moving and "data" not in given:
        return [] if all(sum(row) <= 1 + 1e-6 for row in ends) else [f"the shares {dict(given)} add up to more than 1"]
    if moving:
        return ["with a share that changes, the data have what is left; take `data` out"]
    return [] if abs(sum(ends[0]) - 1) <= 1e-6 else [f"the shares {dict(given)} must not be negative and add up to 1"]


def _finds_share(name: str) -> bool:
    return getattr(registry("answers").get(name), "own_share", False)


def _share(name: str, given: Any) -> Schedule | None:
    """As `share_of`; all that it may be of a source that finds its share itself."""
    return Schedule(0.0, 1.0) if _finds_share(name) else share_of(given)


def replaced(answers: Mapping[str, Any]) -> list[Schedule]:
    """The shares of a step's samples whose answers of the data are not learned from."""
    return [share for share, source in generating(answers).values() if not source.beside]


def _option_error(name: str, given: Any) -> str:
    options, source = _options(name, given), registry("answers").get(name)
    if not issubclass(source, GeneratedAnswers):
        return f"{name} has no options, only a share" if options else ""
    try:
        source(**options)
    except ValidationError as error:
        known = source.model_fields
        return "; and ".join(
            f"{name} has no option {e['loc'][0]!r}; {did_you_mean(str(e['loc'][0]), known)}" if e["type"] == "extra_forbidden"
            else f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors()
        )  # fmt: skip
    return ""


def _options(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not ("share" in given or _finds_share(name)):
        return {}
    return {key: value for key, value in given.items() if key != "share"}


def generating(given: Mapping[str, Any]) -> dict[str, tuple[Schedule, GeneratedAnswers]]:
    """The sources of a stage's `answers` that generate, with their shares; those whose share is always 0 are left out."""
    found = {}
    for name, value in given.items():
        share, source = _share(name, value), registry("answers").get(name)
        if issubclass(source, GeneratedAnswers) and max(share.start, share.end) > 0:
            found[name] = (share, source(**_options(name, value)))
    return found
