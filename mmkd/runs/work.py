"""What a run trains, one thing after another, and how long the rest of it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmkd.evaluation.roles import HARD_ANSWERS, STUDENT
from mmkd.recipes.controls import ControlSpec, TuningSpec, changed
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import terms_of_teacher
from mmkd.towers.tower import Tower
from mmkd.train.spec import StageSpec


@dataclass(frozen=True)
class _Part:
    """One training. samples: that it reads.  like: whose pace it has, "student" or "control"."""

    name: str
    stage: str
    samples: float
    like: str


class Work:
    """All trainings of a run, in their order.

    What has not begun yet is estimated from the pace of what is under way. How much longer a sample takes the student than a
    control is first taken from the models' sizes (a teacher's pass against the student's three), then from the operations that
    the run counts, then from what was measured.
    """

    def __init__(self, recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher]):
        self._parts: list[_Part] = []
        self._ratio = {name: ratio(spec, student, teachers) for name, spec in recipe.stages.items()}
        self._pace: dict[tuple[str, str], float] = {}  # (like, stage) -> seconds a sample
        samples = {name: _samples(recipe, spec) for name, spec in recipe.stages.items()}
        for name, control in recipe.controls.items() if teachers or recipe.writes else ():
            for stage, spec in recipe.stages.items():
                self._parts.append(_of_control(f"control {name}", control, stage, spec, samples[stage]))
        self._parts += [_Part(STUDENT, stage, samples[stage], STUDENT) for stage in recipe.stages]

    def counted(self, counted: Mapping[str, Mapping[str, int]]) -> None:
        """Takes over the operations of a step, {"student" or "control": {stage: operations}}."""
        for stage, operations in counted["control"].items():
            self._ratio[stage] = max(1.0, counted["student"][stage] / max(1, operations))

    def behind(self, name: str, stage: str) -> Callable[[float], float | None]:
        """What tells, given the seconds that a sample takes in this training, how many seconds those after it take; None for the
        last, and for a training that is not part of the run."""
        place = next((n for n, part in enumerate(self._parts) if (part.name, part.stage) == (name, stage)), None)
        if place is None or place + 1 == len(self._parts):
            return lambda pace: None
        here, later = self._parts[place], self._parts[place + 1 :]
        own = STUDENT if here.name == STUDENT else "control"

        def seconds(pace: float) -> float:
            self._pace[own, stage] = pace
            return math.fsum(self._seconds(part, own, stage, pace) for part in later)

        return seconds

    def _seconds(self, part: _Part, own: str, stage: str, pace: float) -> float:
        if (known := self._pace.get((part.like, part.stage))) is not None:
            return part.samples * known
        return part.samples * pace * self._weight(part.like, part.stage) / self._weight(own, stage)

    def _weight(self, like: str, stage: str) -> float:
        return self._ratio[stage] if like == STUDENT else 1.0


def ratio(spec: StageSpec, student: Tower, teachers: Mapping[str, Teacher]) -> float:
    """How much longer a sample takes the student than its control, by the numbers of parameters that read it."""
    terms = spec.build_terms()
    own = 3 * sum(p.numel() for p in student.model.parameters())  # forward, and backward for two kinds of gradients
    read = [
        teacher for name, teacher in teachers.items()
        if teacher.tower is not None and not teacher.stored and terms_of_teacher(terms, name, teachers)
    ]  # fmt: skip
    return (own + sum(p.numel() for teacher in read for p in teacher.tower.model.parameters())) / max(1, own)


def _of_control(name: str, control: ControlSpec, stage: str, spec: StageSpec, samples: float) -> _Part:
    keys = control.stages.get(stage, {})
    length = {"steps", "epochs"} & keys.keys()
    if length:
        own = changed(spec, keys)
        before, after = (own.steps, spec.steps) if own.steps is not None and spec.steps is not None else (own.epochs, spec.epochs)
        samples *= (before or 1.0) / (after or 1.0)
    if control.kind in ("equal_compute", HARD_ANSWERS) and not length:
        return _Part(name, stage, samples, STUDENT)  # of fewer samples, each in less time: as much as the student's
    if control.kind == "tuned":
        tries = control.tries or TuningSpec()
        samples *= len(tries.rates) + len(tries.label_smoothing) + len(tries.targets) - 2
    return _Part(name, stage, samples, "control")


def _samples(recipe: Recipe, spec: StageSpec) -> float:
    """Samples that a stage reads, of a stream by its steps alone."""
    if spec.steps is not None:
        return spec.steps * spec.optimiser.batch_size
    return (spec.epochs or 1.0) * len(stage_samples(recipe, spec))
