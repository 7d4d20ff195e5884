"""Dashboards that show a training: TensorBoard, Weights & Biases, Trackio, through transformers' own callbacks (`report_to`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from mmkd.errors import DataError, one_line
from mmkd.train.spec import TRACKERS

PROJECT = "mmkd"  # under which runs stand, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise
WAY_OUT = {
    "wandb": "log in (`wandb login`), set WANDB_MODE=offline, or take wandb out of report_to",
    "trackio": "or take trackio out of report_to",
    "tensorboard": "or take tensorboard out of report_to",
}


def report(trainer: Trainer, names: Sequence[str], title: str, folder: Path) -> None:
    """Says under which name dashboards show a training, and in which folder TensorBoard's events lie.

    Nothing is sent to a Space of the hub unless TRACKIO_SPACE_ID asks for it.
    """
    if not names:
        return
    trainer.args.run_name = title
    trainer.args.project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trainer.args.trackio_space_id = os.environ.get("TRACKIO_SPACE_ID")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "tb_writer") and callback.logging_dir is None:
            callback.logging_dir = str(folder)
    if "wandb" in names and getattr(sys.modules.get("wandb"), "run", None) is None:
        trainer.add_callback(_EndsWandbRun())


class _EndsWandbRun(TrainerCallback):
    """A stage is a run of its own; transformers would log the next one into the same run."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb

        if wandb.run is not None:
            wandb.finish()


@contextmanager
def refusals(names: Sequence[str]) -> Iterator[None]:
    """What a dashboard refuses, such as a missing login, as DataError on one line with the way out."""
    try:
        yield
    except Exception as error:
        name = type(error).__module__.partition(".")[0]
        if name not in names or name not in TRACKERS:
            raise
        said = one_line(error).rstrip(".")
        raise DataError(f"report_to: {name} says: {said}; {WAY_OUT[name]}") from error
