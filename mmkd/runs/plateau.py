"""Ends a stage at its plateau: scores the student on a validation part while it trains, and keeps the best (`until: plateau`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmkd.base.files import write_whole
from mmkd.base.jsonl import JsonLines
from mmkd.recipes.recipe import Recipe
from mmkd.runs.validation import validation_scores
from mmkd.runs.watch import unchanged_randomness
from mmkd.towers.tower import Tower
from mmkd.train.spec import StageSpec

logger = logging.getLogger(__name__)

SCORES = "validation.jsonl"  # of a stage's folder: {"step", "score", "scores": {benchmark: score}} a line
BEST = "best.safetensors"
FACTS = "plateau.json"  # {"steps", "best", "score", "reached"}


class Measuring(TrainerCallback):
    """Measures a student every `every` steps and after the last, and says whether its stage ends. One process measures, the
    others wait for it."""

    every: int

    def measured(self, step: int) -> bool:
        """Measures the student as it is after a step. Whether the stage is over."""
        raise NotImplementedError

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return None
        over = [False]
        if state.is_world_process_zero:
            with unchanged_randomness():
                over = [self.measured(state.global_step)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(over, src=0)
        control.should_training_stop = control.should_training_stop or over[0]
        return control


class Plateau(Measuring):
    """Every so many steps the mean score on the validation split; ends training after `patience` scores in a row that are not
    above the best before. The weights of the best, of equal ones the first, are kept, and loaded by `best_weights`.

    What was scored up to the checkpoint from which a run goes on is read from the stage's folder, so a stopped run ends as an
    undisturbed one.
    """

    def __init__(
        self, recipe: Recipe, role: str, stage: str, spec: StageSpec, student: Tower, run: Path, folder: Path, done: int,
        tell: Callable[[dict[str, float]], None] | None = None,
    ) -> None:  # fmt: skip
        """done: steps of the checkpoint from which the stage goes on.  tell: takes scores for dashboards."""
        self.tell = tell or (lambda scores: None)
        self.recipe, self.student, self.folder = recipe, student, folder
        self.patience, self.every = spec.until.patience, spec.until.every or recipe.evaluation.every
        self.role, self.stage, self.log = role, stage, run / "log" / f"{role}.jsonl"
        self.answers = run / "during" / role / stage / "validation"
        rows = JsonLines(folder / SCORES).rows() if (folder / SCORES).exists() else []
        self.scores = {row["step"]: row["score"] for row in rows if row["step"] <= done}

    def measured(self, step: int) -> bool:
        """Whether the plateau is reached with the score of this step."""
        found = validation_scores(self.recipe, self.student, self.answers / f"{step:06d}", f"step {step}")
        score = sum(found.values()) / len(found)
        before = max(self.scores.values(), default=-1.0)
        self.scores[step] = score
        if score > before:
            write_whole_model(self.student, self.folder / BEST)
        lines = [json.dumps({"step": s, "score": value}) for s, value in self.scores.items()]
        write_whole(self.folder / SCORES, "\n".join(lines) + "\n")
        row = {"stage": self.stage, "step": step} | {f"score {name}": value for name, value in found.items()}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(self.log).append([row])
        self.tell({f"eval_{name}": value for name, value in found.items()})
        best = self._best()
        over = sum(s > best for s in self.scores) >= self.patience
        logger.info(
            "%s, stage %s, step %d: %.1f %% on the validation split (best %.1f %% at step %d)%s", self.role, self.stage, step,
            100 * score, 100 * self.scores[best], best, "; no better since, the stage ends" if over else "",
        )  # fmt: skip
        facts = {"steps": step, "best": best, "score": self.scores[best], "reached": over}
        write_whole(self.folder / FACTS, json.dumps(facts) + "\n")
        return over

    def _best(self) -> int:
        """The step of the highest score, of equal ones the first."""
        return max(sorted(self.scores), key=self.scores.__getitem__)


def write_whole_model(student: Tower, path: Path) -> None:
    """The student's weights in a file that appears whole or not at all."""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(student.model, str(part))
    part.replace(path)


def best_weights(student: Tower, folder: Path) -> None:
    """Puts the weights of the best evaluation into a student whose stage is over."""
    if (folder / BEST).exists():
        load_model(student.model, str(folder / BEST))


def plateau_facts(run: Path, role: str) -> dict[str, Any]:
    """By stage where training ended and which step was best; {} where no stage ended so."""
    found = sorted((run / "stages" / role).glob(f"*/{FACTS}"))
    return {path.parent.name.partition("_")[2]: json.loads(path.read_text(encoding="utf-8")) for path in found}
