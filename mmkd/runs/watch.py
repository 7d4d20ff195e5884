"""Scores a student while it trains, and leaves nothing changed: the weights come out as without (bit for bit, tested)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmkd.base.distributed import wait_for_all
from mmkd.base.jsonl import JsonLines
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.recipes.recipe import Recipe
from mmkd.runs.validation import validation_benchmarks
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

FOLDER = "during"  # RUN/during/ROLE/STAGE/STEP/BENCHMARK holds answers and results


class Watch(TrainerCallback):
    """Every `evaluation.every` optimiser steps: the recipe's benchmarks, on `evaluation.validation` where there is one.

    Their scores are "score NAME" in the role's log.

    One process asks, the others wait for it.
    """

    def __init__(
        self, recipe: Recipe, role: str, stage: str, student: Tower, run: Path,
        tell: Callable[[dict[str, float]], None] | None = None,
    ):  # fmt: skip
        """tell: takes scores for dashboards."""
        self.tell = tell or (lambda scores: None)
        self.recipe, self.stage, self.student = recipe, stage, student
        self.folder = run / FOLDER / role / stage
        self.log = run / "log" / f"{role}.jsonl"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.recipe.evaluation.every:
            return
        if state.is_world_process_zero:
            with unchanged_randomness():
                self._score(state.global_step)
        wait_for_all()

    def _score(self, step: int) -> None:
        spec = self.recipe.evaluation
        row: dict[str, Any] = {"stage": self.stage, "step": step}
        benchmarks = validation_benchmarks(self.recipe) or [load_benchmark(name) for name in spec.benchmarks]
        for benchmark in benchmarks:
            name = benchmark.name
            results = evaluate(
                self.student,
                benchmark,
                self.folder / f"{step:06d}" / name,
                data_root=self.recipe.data_root,
                batch_size=spec.batch_size,
                limit=spec.limit if spec.validation is None else spec.validation.limit,
                resume=False,
                progress=False,
                model_name=f"step {step}",
            )
            row[f"score {name}"] = results["score"]
            logger.info("step %d, %s: %.1f %%", step, name, 100 * results["score"])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(self.log).append([row])
        self.tell({key.replace("score ", "eval_", 1): value for key, value in row.items() if key.startswith("score ")})


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """The random number generators of Python, NumPy and PyTorch (all GPUs) stand afterwards where they stood before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
