"""Rounds of a run: after each, the student is scored on the validation split, until it stalls."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mmkd.base.distributed import is_main_process, wait_for_all
from mmkd.base.files import write_whole
from mmkd.base.jsonl import read_object
from mmkd.recipes.recipe import Recipe
from mmkd.runs.validation import validation_scores
from mmkd.runs.writes import nothing_new
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

SCORE = "round.json"  # of the folder of a round's last stage


class Rounds:
    """Which stages still run, and which round's student is taken."""

    def __init__(self, recipe: Recipe):
        spec = recipe.rounds
        self._of = {name: number for number, names in enumerate(spec.names if spec else []) for name in names}
        self._last = {max((n for n in names if n in recipe.stages), key=list(recipe.stages).index): number
                      for number, names in enumerate(spec.names if spec else [])}  # fmt: skip
        self._until = spec is not None and spec.until == "stall"
        self._recipe, self._over = recipe, False
        self.best: tuple[float, Path] | None = None

    def skips(self, name: str) -> bool:
        """Whether a stage belongs to a round after the last."""
        return self._over and name in self._of

    def ends_before(self, name: str, recipe: Recipe) -> bool:
        """Whether there is no further round, since nothing new was written for the stage that comes next."""
        if self._of.get(name, 0) > 0 and nothing_new(recipe, name):
            self._over = True
            logger.info("round %d wrote nothing new, so there is none", self._of[name] + 1)
        return self.skips(name)

    def ended(self, name: str, role: str, student: Tower, folder: Path) -> Path:
        """The folder of the student with which the run goes on, when a stage has ended in `folder`."""
        if not self._until or name not in self._last or self._over:
            return folder
        score, number = self._score(role, student, folder), self._last[name] + 1
        stalls = self.best is not None and score <= self.best[0]
        if not stalls:
            self.best = score, folder
        self._over = stalls or number == len(self._last)
        told = f"round {number}: {100 * score:.2f} % on the validation split"
        logger.info("%s, %s%s", role, told, ", not better than the best before; no further round" if stalls else "")
        return self.best[1] if self._over else folder

    def _score(self, role: str, student: Tower, folder: Path) -> float:
        path = folder / SCORE
        if not path.exists() and is_main_process():
            scores = validation_scores(self._recipe, student, folder / "round", role)
            facts: dict[str, Any] = {"score": sum(scores.values()) / len(scores), "benchmarks": scores}
            write_whole(path, json.dumps(facts, indent=1) + "\n")
        wait_for_all()
        return float(read_object(path)["score"])
