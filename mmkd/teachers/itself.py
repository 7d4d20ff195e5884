"""A teacher that is made of the student itself: as the stage began, as a moving average, or as it is now.

With another view of the sample (`teacher.prompt`, `teacher.images`) it teaches the student what it says when it is told more
(OPSD, arXiv 2601.18734); with `start` and the same view it holds on to what the student was (OvSGTR, arXiv 2311.10988).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model, save_model

from mmkd.errors import TowerError
from mmkd.registry import register
from mmkd.teachers.live import ALL, LiveSignals, LiveTeacher
from mmkd.teachers.opening import Opening
from mmkd.teachers.spec import TeacherSpec
from mmkd.teachers.teacher import Gives
from mmkd.teachers.view import View
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Seen, Tower, TowerInputs

START, EMA, CURRENT = "start", "ema", "current"


@register("teachers", "self")
class SelfTeacher(LiveTeacher):
    """The student itself: at the start of the stage, as a moving average, or as it is now."""

    of_student = True
    options: ClassVar[tuple[str, ...]] = ("self", "decay")

    def __init__(self, which: str, decay: float = 0.999, name: str = "teacher", view: View | None = None):
        self.which, self.decay, self.name, self.view_of_sample = which, decay, name, view

    @classmethod
    def open(cls, spec: TeacherSpec, opening: Opening) -> SelfTeacher:
        return cls(spec.self, spec.decay, opening.name, spec.view)

    @property
    def gives(self) -> Gives:
        signals = set(ALL) - {"switch"} if self.which == CURRENT else set(ALL)
        return Gives("the student itself", frozenset(signals))

    def meet(self, student: Tower) -> None:
        self.tower = self.body = student

    def begin(self, student: Tower) -> None:
        self._student = student
        self.tower = self.body = student if self.which == CURRENT else _copy(student).freeze()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.which != EMA:
            return
        own = self._student.model
        for name, kept in self.tower.model.named_parameters():  # tied weights once
            kept.lerp_(own.get_parameter(name).to(kept), 1 - self.decay)
        for name, kept in self.tower.model.named_buffers():
            kept.copy_(own.get_buffer(name))

    def save_state(self, folder: Path) -> None:
        if self.which == EMA:
            save_model(self.tower.model, str(self._file(folder)))

    def load_state(self, folder: Path) -> None:
        """Raises TowerError where the checkpoint has none."""
        if self.which != EMA:
            return
        if not self._file(folder).exists():
            raise TowerError(f"{folder} has no moving average of the student for the {self.name}; begin the stage anew")
        load_model(self.tower.model, str(self._file(folder)))

    def _file(self, folder: Path) -> Path:
        return folder / f"teacher_{self.name}.safetensors"

    def say(
        self, inputs: TowerInputs, host: TowerInputs, *, shared: Seen | None = None, differentiable: bool = False
    ) -> LiveSignals:
        kind = CurrentSignals if self.which == CURRENT else LiveSignals
        return kind(self.tower, inputs, host, shared, differentiable)

    def shares_encoder(self, student: Tower, inputs: Any) -> bool:
        """Its encoder is the student's at the first step, and may be another at the next."""
        return False


class CurrentSignals(LiveSignals):
    """Passes through the student as it is, without gradient and without dropout."""

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self.tower.model):
            yield


def _copy(student: Tower) -> Tower:
    """The same tower with weights of its own."""
    tower = copy.copy(student)
    tower.__dict__.pop("_grams", None)  # of the student's head
    tower.model = copy.deepcopy(student.model)
    tower.preparer = copy.copy(student.preparer)
    tower.preparer._model = tower.model
    return tower
