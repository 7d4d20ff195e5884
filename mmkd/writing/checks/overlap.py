"""Questions and pictures of benchmarks, which no student may be trained on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmkd.data.samples import Question
from mmkd.errors import DataError, ImageError, SampleError
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check, Surroundings
from mmkd.writing.words import folded

logger = logging.getLogger(__name__)

CELLS, COARSE = 16, 4  # a side
# Of 255: how far the mean colour of a cell, and of all cells together, may be for the same picture. JPEG of quality 20, WebP and
# another size (from 0.7 times on) of photographs and drawings stay below; a shape of another colour does not.
CELL, MEAN = 40, 6.0


@register("checks", "overlap")
@dataclass
class Overlap(Check):
    """Drops rows that hold a picture or a question of a benchmark; stands in every write stage.

    benchmarks: names of cards; "recipe": those of `evaluation.benchmarks`, as they are scored and as they are chosen on. A
    picture counts however it is encoded or slightly resized. A question counts whatever its case, punctuation and white space,
    with its picture or, where the benchmark asks it of one picture only, without; by `text: any` each, by `text: never` with its
    picture alone."""

    benchmarks: tuple[str, ...] = ("recipe",)
    text: Literal["unique", "any", "never"] = "unique"
    off: bool = False  # takes the check away

    def prepare(self, around: Surroundings) -> None:
        self._index: Index | None = None
        self._sources: list[Callable[[], Sequence[Question]]] = []
        for name in () if self.off else self.benchmarks:
            if name == "recipe":
                self._sources += around.benchmarks.values()
            elif around.questions_of is None:
                raise DataError(f"overlap.benchmarks: {name} cannot be read here")
            else:
                around.questions_of(name)  # whether it is there, before anything is asked
                self._sources.append(partial(around.questions_of, name))

    def start(self) -> None:
        if self._index is None:  # every picture of the benchmarks is decoded: not before answers are there
            self._index = Index()
            for questions in self._sources:
                self._index.add(questions())

    def refuse(self, one: Candidate) -> str | None:
        if self.off or self._index is None:
            return None
        if any(self._index.has_picture(picture) for picture in one.pictures):
            return "a benchmark's picture"
        asked = self._index.asked(one.row["question"], one.row.get("choices") or ())
        if asked == 0 or self.text == "never" or (asked > 1 and self.text == "unique"):
            return None
        return "a benchmark's question"


class Index:
    """Pictures and questions of benchmarks."""

    def __init__(self) -> None:
        self._cells: list[np.ndarray] = []
        self._keys: set[str] = set()
        self._texts: dict[str, set[str]] = defaultdict(set)  # question -> pictures that it is asked of
        self._known: dict[str, bool] = {}
        self._stacked: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, questions: Iterable[Question]) -> None:
        for question in questions:
            shown = "\n".join(ref.key for ref in question.images)
            for text in _forms(question.question, question.choices):
                self._texts[text].add(shown)
            for ref in question.images:
                if ref.key not in self._keys:
                    self._keys.add(ref.key)
                    if (cells := cells_of(ref)) is not None:
                        self._cells.append(cells)
        self._stacked = None

    def asked(self, question: str, choices: Sequence[str] = ()) -> int:
        """Of how many pictures a question is asked; one without a picture counts as one."""
        return max((len(self._texts.get(text, ())) for text in _forms(question, choices)), default=0)

    def has_picture(self, ref: Any) -> bool:
        """Whether a picture is one of these, however it is encoded."""
        if ref.key not in self._known:
            self._known[ref.key] = ref.key in self._keys or self._looks_like_one(ref)
        return self._known[ref.key]

    def _looks_like_one(self, ref: Any) -> bool:
        cells = cells_of(ref) if self._cells else None
        if cells is None:
            return False
        if self._stacked is None:
            fine = np.stack(self._cells)  # [pictures, CELLS, CELLS, 3]
            self._stacked = fine, _coarse(fine)
        fine, coarse = self._stacked
        # Where no cell is further away than CELL, no mean of cells is: this leaves out none.
        near = (np.abs(coarse - _coarse(cells[None])).max(axis=(1, 2, 3)) <= CELL).nonzero()[0]
        apart = np.abs(fine[near].astype(np.int16) - cells.astype(np.int16))
        return bool(((apart.max(axis=(1, 2, 3)) <= CELL) & (apart.mean(axis=(1, 2, 3)) <= MEAN)).any())


def _forms(question: str, choices: Sequence[str]) -> set[str]:
    """A question alone, and with its choices in whatever order."""
    alone = folded(question)
    return {alone + "\0" + "\0".join(sorted(map(folded, choices)))} if choices else {alone}


def cells_of(ref: Any) -> np.ndarray | None:
    """The mean colours of a picture's cells [CELLS, CELLS, 3] as bytes; None for one that cannot be read."""
    try:
        picture = ref.load()
    except (ImageError, SampleError) as error:
        logger.info("not compared: %s", error)
        return None
    return np.asarray(picture.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.uint8)


def _coarse(cells: np.ndarray) -> np.ndarray:
    """Means of neighbouring cells [pictures, COARSE, COARSE, 3]."""
    step = CELLS // COARSE
    return cells.reshape(len(cells), COARSE, step, COARSE, step, 3).mean(axis=(2, 4), dtype=np.float32)
