"""The student's own answers, as many as it needs, and many of them again (DistiLLM)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mmkd.answers import Memory
from mmkd.answers.student import StudentAnswers
from mmkd.errors import DataError
from mmkd.registry import register


@register("answers", "adaptive")
class AdaptiveAnswers(StudentAnswers):
    """More answers of the student whenever its held-out loss stalls, many of them earlier ones (DistiLLM, arXiv 2402.03898).

    Of a step's samples phi are the student's: 1 - t of these answered anew, t of them answers of the last `capacity`, with their
    own prompts, t going from 0 to 1 over the stage; all anew while there are fewer. Our choice: a coin a sample instead of one a
    step; the loss is compared with the lowest before it (the released code: with that at the last rise, and 0.1 above it).
    """

    own_share: ClassVar[bool] = True

    start: Annotated[float, Field(ge=0, le=1)] = 0.0  # phi before the first rise
    rise: Annotated[float, Field(gt=0, le=1)] = 0.1  # by how much phi rises, up to 1
    tolerance: Annotated[float, Field(ge=0, le=1e3)] = 0.0  # it rises where the loss is no more than this below the lowest before
    every: Annotated[int, Field(ge=1, le=10**9)] = 100  # steps between two measurements
    held_out: Annotated[int, Field(ge=1, le=10**6)] = 64  # samples that are measured on and never trained on; a tenth at most
    capacity: Annotated[int, Field(ge=1, le=10**6)] = 1000  # answers that are kept, the last ones

    def memory(self, size: int, seed: int) -> Replay:
        out = min(self.held_out, size // 10)
        if not out:
            raise DataError(f"answers: adaptive holds a tenth of the samples out, and there are {size}; give ten at least")
        places = frozenset(random.Random(f"held out {seed}").sample(range(size), out))
        return Replay(self, places)


class Replay(Memory):
    """phi, the lowest loss before, and the student's last answers."""

    def __init__(self, options: AdaptiveAnswers, held_out: frozenset[int]):
        self.options, self.held_out, self.every = options, held_out, options.every
        self.phi, self.lowest = options.start, None
        self.kept: deque[tuple[int, list[int]]] = deque(maxlen=options.capacity)

    @property
    def is_measured(self) -> bool:
        return self.lowest is not None

    def share(self, progress: float) -> float:
        # Before the first measurement nothing is trained; who counts what a step costs takes the most that it may be.
        return self.phi if self.is_measured else 1.0

    def recalled(self, place: float, draw: int, progress: float) -> tuple[int, list[int]] | None:
        if place < 1 - progress or len(self.kept) < self.options.capacity:
            return None
        return self.kept[draw % len(self.kept)]

    def keep(self, answers: Sequence[tuple[int, list[int]]]) -> None:
        self.kept.extend((index, list(ids)) for index, ids in answers)

    def measured(self, loss: float) -> None:
        if self.lowest is not None and not loss < self.lowest - self.options.tolerance:
            self.phi = min(1.0, self.phi + self.options.rise)
        self.lowest = loss if self.lowest is None else min(self.lowest, loss)

    def state(self) -> dict[str, Any]:
        return {"phi": self.phi, "lowest": self.lowest, "kept": list(self.kept)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.phi, self.lowest = float(state["phi"]), state["lowest"]
        self.kept.clear()
        self.keep([(int(index), ids) for index, ids in state["kept"]])
