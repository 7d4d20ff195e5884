"""What a training says while it runs: a line of the log every few seconds, and a bar below it on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from mmkd.base.bars import in_time, on_terminal, pace

EVERY = 10.0  # seconds between two lines; log/ROLE.jsonl has every row
SHOWN = 6  # terms of a line
NO_TERM = ("loss", "grad_norm", "learning_rate", "epoch")

logger = logging.getLogger(__name__)

Behind = Callable[[float], float | None]  # seconds that one sample takes here -> seconds of what is trained after this


class TrainingLines(TrainerCallback):
    """Lines with step, loss and terms, samples a second, memory, and how long the stage and the whole run will take."""

    def __init__(self, what: str, batch: int, terms: Sequence[str] | None = None, behind: Behind | None = None):
        """what: whose stage.  batch: samples a step.  terms: that lines show, None for all that is logged.

        behind: how long the stages after this one take; None where nothing is known of them.
        """
        self.what, self.batch, self.terms, self.behind = what, batch, terms, behind
        self._bar: Any = None
        self._first = 0  # step from which this process trains
        self._began = self._told = 0.0
        self._told_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._first = self._told_step = state.global_step
        self._began = time.monotonic()
        self._told = float("-inf")
        if state.is_world_process_zero and on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.what, unit="step", leave=False, delay=0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, last = time.monotonic(), state.global_step + state.logging_steps > state.max_steps
        if now - self._told < EVERY and not last:
            return
        since = self._began if self._told == float("-inf") else self._told
        rate = (state.global_step - self._told_step) * self.batch / max(1e-9, now - since)
        parts = [*in_numbers(logs, self.terms), f"{pace(rate)} samples/s", *memory(), *self._left(state, now)]
        logger.info("%s %s/%s: %s", self.what, f"{state.global_step:,}", f"{state.max_steps:,}", ", ".join(parts))
        self._told, self._told_step = now, state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()
        done = state.global_step - self._first
        if state.is_world_process_zero and done:
            took = time.monotonic() - self._began
            rate = pace(done * self.batch / max(1e-9, took))
            logger.info("%s: %s steps in %s, %s samples/s", self.what, f"{done:,}", in_time(took), rate)

    def close(self) -> None:
        """Takes the bar away, so that what is written next, such as an error, does not stand behind it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, state: TrainerState, now: float) -> list[str]:
        """Of the stage, and of the whole run where more is trained after it."""
        step = (now - self._began) / max(1, state.global_step - self._first)
        own = step * (state.max_steps - state.global_step)
        behind = self.behind(step / self.batch) if self.behind is not None else None
        stage = [f"{in_time(own)} left"] if own else []
        return [*stage, f"run about {in_time(own + behind)}"] if behind else stage


def in_numbers(logs: Mapping[str, Any], terms: Sequence[str] | None = None) -> list[str]:
    """Loss, terms, gradient and learning rate of a row of the log, in few digits."""
    names = [name for name in (logs if terms is None else terms) if name in logs and name not in NO_TERM]
    names = [name for name in names if isinstance(logs[name], int | float)]
    loss = f"loss {logs['loss']:.4g}"
    if names and not (len(names) == 1 and f"{logs[names[0]]:.4g}" == f"{logs['loss']:.4g}"):
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        loss += f" ({', '.join(f'{name} {logs[name]:.4g}' for name in names[:SHOWN])}{rest})"
    found = [loss]
    if (norm := logs.get("grad_norm")) is not None:
        found.append(f"gradient {float(norm):.3g}")
    if (rate := logs.get("learning_rate")) is not None:
        found.append(f"rate {rate:.2g}")
    return found


def memory() -> list[str]:
    """The most memory that this process had at once: of its GPU where it has one, else its own."""
    if torch.cuda.is_available():
        return [f"GPU {torch.cuda.max_memory_reserved() / 1e9:.1f} GB"]
    try:
        import resource
    except ImportError:  # Windows
        return []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [f"{peak / 1e9:.1f} GB"]
