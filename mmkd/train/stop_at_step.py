"""Ends a stage after the step that is under way when this process, or another of its run, is asked to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from mmkd.base import stopping
from mmkd.base.stopping import Terminated


class StopWhenAsked(TrainerCallback):
    """Writes a checkpoint and stops. With several processes `agreed` is set by the trainer, for all in the same step."""

    def __init__(self) -> None:
        self.agreed = False  # some process was asked

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed or (args.world_size == 1 and stopping.asked()):
            self.agreed = True
            control.should_save = control.should_training_stop = True


@contextmanager
def ends_when_asked(trainer: Any, what: str) -> Iterator[None]:
    """For a training loop. Raises Terminated behind it where its end was asked for, when the checkpoint is written."""
    with stopping.until_saved():
        yield
    if trainer.stop.agreed and trainer.state.global_step < trainer.state.max_steps:
        raise Terminated(f"{what} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, in a checkpoint")
    if stopping.asked():
        raise Terminated
