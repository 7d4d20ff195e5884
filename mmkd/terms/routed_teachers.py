"""Several teachers, of which each sample has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.errors import SampleError, shown
from mmkd.registry import register
from mmkd.terms.mixture import TeacherMixture
from mmkd.terms.signals import Signals
from mmkd.terms.term import Rows
from mmkd.towers.samples import Sample


@register("terms", "routed_teachers")
@dataclass(frozen=True)
class RoutedTeachers(TeacherMixture):
    """A divergence to the teacher of each sample, chosen by what the data say of it: `teachers: {NAME: [VALUE, ...]}`."""

    example: ClassVar[Mapping[str, Any]] = {"teachers": {"a": ["charts"], "b": ["photos"]}}
    origin: ClassVar[str] = "this project"
    status: ClassVar[str] = "our choice: by `tag` of the data entry, or a key of a question's categories or `told`"

    teachers: dict[str, list[str]] = field(default_factory=dict)
    by: str = "tag"
    otherwise: str | None = None  # the teacher of all other samples; without it these are left out

    @property
    def several(self) -> tuple[str, ...]:
        more = () if self.otherwise is None or self.otherwise in self.teachers else (self.otherwise,)
        return (*self.teachers, *more)

    def errors(self) -> list[str]:
        if not isinstance(self.teachers, dict) or not all(isinstance(v, list) and v for v in self.teachers.values()):
            return ["teachers: give each the values that it teaches, {NAME: [VALUE, ...]}"]
        values = [str(value) for given in self.teachers.values() for value in given]
        twice = sorted({value for value in values if values.count(value) > 1})
        return [*super().errors(), *([f"teachers: {', '.join(twice)} are given to two of them"] if twice else [])]

    def sample_fact(self, sample: Sample) -> str:
        """The name of its teacher."""
        value = fact_of(sample, self.by)
        name = next((name for name, values in self.teachers.items() if value in map(str, values)), self.otherwise)
        if name is None:
            raise SampleError(
                f"sample {sample.id!r}: its {self.by} is {shown(value)}, which {self.name}.teachers gives to nobody; name one as "
                "`otherwise`"
            )
        return name

    def weights(self, signals: Signals, views: Sequence[Signals], rows: Sequence[Rows]) -> Tensor:
        place = {name: number for number, name in enumerate(self.several)}
        chosen = torch.tensor([place[name] for name in signals.facts])[rows[0].samples]  # [R]
        return torch.nn.functional.one_hot(chosen, len(place)).T.float().to(signals.device)


def fact_of(sample: Sample, key: str) -> str | None:
    """What the data say of a sample under a key: the tag of its entry, a category, or what is told."""
    question = sample.meta.get("question")
    known = {} if question is None else question.categories | question.told
    value = known.get(key) if key in known else sample.meta.get(key)
    return None if value is None else str(value)
