"""A teaching assistant and what it lacks of the teacher, as two branches (MonoTAKD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mmkd.errors import DataError
from mmkd.registry import register
from mmkd.terms.bridge import Bridge
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Term


@register("terms", "residual_match")
@dataclass(frozen=True)
class ResidualMatch(Term):
    """Trained maps of the student's vision features to an assistant's features, and to what these lack of the teacher's."""

    example: ClassVar[Mapping[str, Any]] = {"assistant": "a"}
    origin: ClassVar[str] = "MonoTAKD (arXiv 2404.04910)"
    status: ClassVar[str] = (
        "our choice: the signed residual (the paper's is absolute, from which the teacher cannot be rebuilt), no normalisation "
        "(the released one cuts the gradient), both maps beside the student and dropped with the stage"
    )
    needs: ClassVar[tuple[str, ...]] = ("student.features", "teacher.features")
    count: ClassVar[str] = "image"

    assistant: str = ""  # the name of a teacher; the term's `teacher` is the large one
    residual: float = 0.2  # weight of the second branch
    threshold: float = 0.6  # entries of the residual below this share of its largest count as 0

    @property
    def several(self) -> tuple[str, ...]:
        return (self.place.teacher or "", self.assistant)

    def errors(self) -> list[str]:
        found = [] if 0 <= self.threshold <= 1 else [f"threshold is {self.threshold}; it lies between 0 and 1"]
        found += ["residual must not be negative"] if self.residual < 0 else []
        if not self.assistant:
            found.append("assistant: name one of the recipe's `teachers`, and the large one as `teacher`")
        return found

    def check(self, pair: Pair) -> list[str]:
        if missing := [name for name in self.several if name not in pair.teachers]:
            return [f"needs a `teacher` and an `assistant` by name; there is no {', '.join(map(repr, missing))}"]
        large, small = (pair.teachers[name].feature_width for name in self.several)
        if large != small:
            return [f"the features of {self.several[0]} are {large} wide, those of {self.assistant} {small}; they must be alike"]
        return []

    def extra(self, pair: Pair) -> nn.Module:
        width = pair.teachers[self.assistant].feature_width
        return nn.ModuleList([Bridge(pair.student.feature_width, width) for _ in range(2)])

    def loss(self, signals: Signals) -> Tensor:
        large, small = (signals.of(name)["teacher.features"] for name in self.several)
        total = signals.zero
        for own, teacher, assistant in zip(signals["student.features"], large, small, strict=True):
            if teacher.shape != assistant.shape:
                raise DataError(
                    f"{self.name}: the teacher has {len(teacher)} vision features of a picture and {self.assistant} "
                    f"{len(assistant)}; a residual needs the same places"
                )
            total = total + branches(own, teacher, assistant, signals.extra, self.threshold, self.residual)
        return total

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        return sum((branch(features, len(features)).sum() * 0.0 for branch in signals.extra), signals.zero)


def residual_of(teacher: Tensor, assistant: Tensor, threshold: float) -> Tensor:
    """What the assistant lacks, entries below `threshold` of the largest 0. [n, D]"""
    lacking = teacher - assistant
    return lacking * (lacking.abs() >= threshold * lacking.abs().max())


def branches(
    own: Tensor, teacher: Tensor, assistant: Tensor, maps: Sequence[nn.Module], threshold: float, weight: float
) -> Tensor:
    """Mean squared errors of both branches. own: the student's features [m, Ds]."""
    first, second = (branch(own, len(assistant)) for branch in maps)
    lacking = residual_of(teacher, assistant, threshold)
    return (first - assistant).square().mean() + weight * (second - lacking).square().mean()
