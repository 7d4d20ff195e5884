"""A teacher that runs in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.data.samples import Sample
from mmkd.engine.positions import any_of, gathered, image_rows, rows_at
from mmkd.registry import register
from mmkd.teachers.opening import Opening
from mmkd.teachers.shared_encoder import sees_alike
from mmkd.teachers.spec import TeacherSpec
from mmkd.teachers.teacher import Gives, Teacher, TeacherSignals, read_by
from mmkd.teachers.view import View
from mmkd.towers.loading import device_of_process, dtype_of, to_device
from mmkd.towers.recompute import recompute_layers
from mmkd.towers.tower import Encoded, Seen, Tower, TowerInputs

ALL = ("rows", "hidden", "visual_rows", "features", "gram", "switch")
ROWS = ("rows", "hidden", "gram")  # of a model whose pictures are no tokens of its text


@register("teachers", "live")
class LiveTeacher(Teacher):
    """The model itself, in this process."""

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tower: Tower, name: str = "teacher", view: View | None = None):
        self.tower = self.body = tower.freeze()
        self.name, self.view_of_sample = name, view
        self._sees_alike: bool | None = None  # found out on the first batch with pictures

    @classmethod
    def open(cls, spec: TeacherSpec, opening: Opening) -> LiveTeacher:
        """Loads the model onto this process's device. Raises TowerError."""
        return cls(load_tower(spec, opening.max_length), opening.name, spec.view)

    @property
    def gives(self) -> Gives:
        name = "the live teacher"
        if self.body.has_visual_tokens:
            return Gives(name, frozenset(ALL))
        return Gives(name, frozenset(ROWS), positions=frozenset({"response", "answer"}), why=self.body.lacks())

    def fingerprint(self) -> str:
        return self.tower.fingerprint()

    def prepare(self, sample: Sample, encoded: Encoded, *, student: Tower, alike: bool) -> Encoded:
        return encoded if alike else self.body.encode(self.view(sample))

    def collate(self, prepared: Sequence[Encoded]) -> TowerInputs:
        return self.body.collate(prepared)

    def say(
        self, inputs: TowerInputs, host: TowerInputs, *, shared: Seen | None = None, differentiable: bool = False
    ) -> LiveSignals:
        return LiveSignals(self.tower, inputs, host, shared, differentiable)

    def shares_encoder(self, student: Tower, inputs: TowerInputs) -> bool:
        """Whether one pass of the vision encoder serves both towers on these inputs, which must be the same for both."""
        if not inputs.pixels or not self.tower.has_visual_tokens:
            return False
        if self._sees_alike is None:
            self._sees_alike = sees_alike(student, self.tower, inputs)
        return self._sees_alike


class LiveSignals(TeacherSignals):
    """Passes of the teacher over one batch."""

    def __init__(self, tower: Tower, inputs: TowerInputs, host: TowerInputs, shared: Seen | None, differentiable: bool):
        self.tower, self.inputs, self.host, self.shared = tower, inputs, host, shared
        self.differentiable = differentiable

    def _frozen(self) -> Any:
        """Inference mode for the teacher's own passes; not beside the switch, whose gradients pass through what the teacher's
        modules keep between calls."""
        return torch.no_grad() if self.differentiable else torch.inference_mode()

    @cached_property
    def seen(self) -> Seen:
        with self._frozen():
            if self.shared is not None:
                features = [f.detach() for f in self.shared.features]
                return Seen(features, self.tower.project(features))
            return self.tower.see(self.inputs)

    @cached_property
    def _hidden(self) -> Tensor:
        seen = self.seen
        with self._frozen():
            return read_by(self.tower, self.inputs, seen)  # [B, L, Dt]

    def hidden(self) -> Tensor:
        return self._hidden

    def features(self) -> list[Tensor]:
        return [features.clone() for features in self.seen.features]

    def rows(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        where = any_of(rows_at(self.host, name) for name in positions)  # [B, L]
        if samples is not None:
            where = where & torch.tensor(samples)[:, None]
        return {"hidden": gathered(self._hidden, where)}

    def visual_rows(self) -> list[Tensor]:
        return image_rows(self._hidden, self.host)


@dataclass
class SignalsAhead(TeacherSignals):
    """What a teacher said of a batch before its step (`teachers.ahead`)."""

    seen: Seen
    states: Tensor | None  # [B, L, Dt]; None where terms compare vision features only
    shared: bool  # whether the features are the student's too
    host: TowerInputs

    def hidden(self) -> Tensor:
        return self.states

    features = LiveSignals.features

    def rows(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        return {"hidden": gathered(self.states, any_of(rows_at(self.host, name) for name in positions))}

    def visual_rows(self) -> list[Tensor]:
        return image_rows(self.states, self.host)


def as_teachers(given: Teacher | Tower | Mapping[str, Teacher] | None) -> dict[str, Teacher]:
    """Teachers by name; a tower or a single teacher is one called "teacher"."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    teacher = given if isinstance(given, Teacher) else LiveTeacher(given)
    return {teacher.name: teacher}


def load_tower(spec: TeacherSpec, max_length: int) -> Tower:
    """The teacher's model on this process's device, frozen. Raises TowerError."""
    tower = Tower.load(
        spec.model, dtype=dtype_of(spec.dtype), quantise=spec.quantise, trust_remote_code=spec.trust_remote_code,
        attn_implementation=spec.attn_implementation, device=device_of_process(), max_length=max_length,
        reading=spec.reading,
    )  # fmt: skip
    if spec.gradient_checkpointing:
        recompute_layers(tower)
    return to_device(tower).freeze()
