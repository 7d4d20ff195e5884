"""Several teachers at weights that a recipe gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.base.schema import is_number
from mmkd.registry import register
from mmkd.terms.mixture import TeacherMixture
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows


@register("terms", "mixed_teachers")
@dataclass(frozen=True)
class MixedTeachers(TeacherMixture):
    """A divergence to several teachers at given weights, `teachers: {NAME: WEIGHT}`, which are made to add up to 1."""

    example: ClassVar[Mapping[str, Any]] = {"teachers": {"a": 0.5, "b": 0.5}}
    origin: ClassVar[str] = "You et al. (KDD 2017), averaged teachers"
    status: ClassVar[str] = "our choice: weights of one's own, any divergence"

    teachers: dict[str, float] = field(default_factory=dict)

    def errors(self) -> list[str]:
        found = super().errors()
        if not found and not isinstance(self.teachers, dict):
            return ["teachers: give each a weight, {NAME: WEIGHT}"]
        values = list(self.teachers.values()) if not found else []
        if any(not is_number(value) or value < 0 for value in values) or (values and sum(values) <= 0):
            found.append(f"teachers is {self.teachers}; weights are numbers from 0 on, not all 0")
        return found

    def weights(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows]) -> Tensor:
        given = torch.tensor([float(value) for value in self.teachers.values()], device=signals.device)
        return (given / given.sum())[:, None].expand(-1, len(rows[0].targets))
