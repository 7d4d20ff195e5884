"""New answers to the prompts of a stage: what lies between its data and its answer source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.answers import Asked
from mmkd.errors import DataError
from mmkd.teachers.teacher import Teacher
from mmkd.towers.tower import Tower
from mmkd.train.batch import Pair
from mmkd.train.collate import PairDataset
from mmkd.train.skips import Skip


@dataclass
class Waiting:
    """What the loader gives in place of a batch: samples that are collated when their answers are known."""

    pairs: list[Pair | Skip]


class Rollouts:
    """A stage as its answer source sees it (`mmkd.answers.Stage`)."""

    def __init__(self, dataset: PairDataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self._collator = dataset.collator

    @property
    def size(self) -> int:
        return len(self.dataset)

    @property
    def student(self) -> Tower:
        return self.dataset.student

    @property
    def teachers(self) -> dict[str, Teacher]:
        return self.dataset.teachers

    def is_skip(self, pair: Pair | Skip) -> bool:
        return isinstance(pair, Skip)

    def pair(self, place: int) -> Pair | Skip:
        return self.dataset.look(place)

    def usable(self, pair: Pair, held_out: frozenset[int]) -> Pair:
        while pair.index in held_out:
            pair = self.dataset.next_usable(pair.index)
        return pair

    def asked(self, pair: Pair, seed: int) -> Asked:
        theirs = {name: pair.prompts[name] for name in self.dataset.teachers}
        return Asked(pair.prompts["student"], tuple(ref.key for ref in pair.sample.images), seed, theirs, pair.sample)

    def answered(self, pair: Pair, ids: Sequence[int], draw: int) -> Pair | Skip:
        return self.dataset.answered(pair, ids, draw)

    def batch(self, pairs: Sequence[Pair | Skip]) -> dict[str, Any]:
        return self._collator(pairs)


def wait(pairs: Sequence[Pair | Skip]) -> dict[str, Waiting]:
    """The collator of a stage whose answers are generated."""
    return {"batch": Waiting(list(pairs))}


def refuse_stored(teachers: Sequence[Teacher]) -> None:
    """Raises DataError for teachers that cannot read answers which are not there yet."""
    if wrong := [error for teacher in teachers if (error := stored_error(teacher))]:
        raise DataError("; ".join(wrong))


def stored_error(teacher: Teacher) -> str:
    """Why a teacher cannot score answers that the student has not given yet; "" if it can."""
    if not teacher.stored:
        return ""
    return (
        f"the {teacher.name} is a cache ({teacher.storage()}), which has not seen the answers that the student will give; take "
        "the cache out, so that the model reads them, or take `student` out of `answers`"
    )
