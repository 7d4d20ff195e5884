"""Stops training at the first loss or gradient that is not finite, and keeps the batch.

    RUN/not_finite/ROLE_STAGE_stepN/        (…_rankR of the other processes)
        report.json             step, terms that are not finite, sample ids, counts; what `mmkd check` needs to replay it
        batch_K.safetensors     the K-th micro-batch of the step as towers got it, with batch_K.json for what is no tensor
        weights.safetensors     student and terms before the step, where they are finite

On an accelerator nothing waits for an answer: flags stay there and are copied to the host behind the work that is under way;
one that has arrived is looked at in the next step. All are waited for when losses are logged and before weights are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from mmkd.base.distributed import rank
from mmkd.base.files import write_whole
from mmkd.errors import NotFiniteError
from mmkd.towers.finite import not_finite
from mmkd.train.batch_file import save_batch

FOLDER, REPORT, WEIGHTS = "not_finite", "report.json", "weights.safetensors"
LOSS, GRADIENT = "loss", "gradient"  # beside the terms' names
KEPT = 4  # steps whose batches are kept until their flags have arrived
NAMED = 8  # sample ids that a message lists


@dataclass(frozen=True)
class Where:
    """What a report says beside the values: the run's folder, role and stage, and the whole recipe."""

    run: Path
    role: str
    stage: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Step:
    """A step whose flags have not been looked at."""

    number: int  # 1 is the first
    names: list[str] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)  # [V] bool each, True for a value that is not finite
    micro: list[int] = field(default_factory=list)  # of which micro-batch each group of flags is; -1 for the gradient
    batches: list[Any] = field(default_factory=list)
    ids: list[list[str]] = field(default_factory=list)  # of each micro-batch
    facts: dict[str, Any] = field(default_factory=dict)
    arrived: tuple[Tensor, Any] | None = None  # on the host, and the event after which it is whole


class FiniteWatch:
    """Looks after the values of each step of one stage.

    trained: gives what is trained, as one module, for the report; None where no process has the whole of it.
    """

    def __init__(self, where: Where, trained: Callable[[], nn.Module | None]):
        self.where, self._trained = where, trained
        self._steps: list[_Step] = []

    def losses(
        self, step: int, batch: Any, ids: Sequence[str], loss: Tensor, sums: Mapping[str, Tensor], **facts: Any
    ) -> None:
        """Notes a micro-batch of `step`, on the CPU, with its samples, its loss and the sum of each term.

        facts: of the step, for a replay.
        """
        if not self._steps or self._steps[-1].number != step:
            self._steps.append(_Step(step, facts=facts))
            for old in self._steps[:-KEPT]:
                old.batches.clear()
        now = self._steps[-1]
        self._note(now, {**sums, LOSS: loss}, len(now.batches))
        now.batches.append(batch)
        now.ids.append(list(ids))

    def gradient(self, norm: Tensor | float | None) -> None:
        """Notes the norm of the gradient, the last value of a step, and looks at what has arrived. Raises NotFiniteError."""
        if not self._steps:
            return
        now = self._steps[-1]
        if norm is not None:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)  # sharded, or a number
            self._note(now, {GRADIENT: whole}, -1)
        _send(now)
        self._look(wait=False)

    def look(self) -> None:
        """Waits for all flags. Raises NotFiniteError."""
        for step in self._steps:
            _send(step)
        self._look(wait=True)

    def _note(self, step: _Step, values: Mapping[str, Tensor], micro: int) -> None:
        stacked = torch.stack([value.detach().float() for value in values.values()])
        step.names += values
        step.flags.append(~torch.isfinite(stacked))
        step.micro += [micro] * len(values)

    def _look(self, *, wait: bool) -> None:
        while self._steps and self._steps[0].arrived is not None:
            flags, event = self._steps[0].arrived
            if event is not None and not wait and not event.query():
                return
            if event is not None:
                event.synchronize()
            step = self._steps.pop(0)
            if bool(flags.any()):
                self._stop(step, flags)

    def _stop(self, step: _Step, flags: Tensor) -> None:
        found = [(name, micro) for name, micro, bad in zip(step.names, step.micro, flags.tolist(), strict=True) if bad]
        names = list(dict.fromkeys(name for name, _ in found))
        terms = [name for name in names if name not in (LOSS, GRADIENT)] or names
        told = sorted({micro for _, micro in found if micro >= 0} or set(range(len(step.ids))))
        ids = [name for micro in told for name in step.ids[micro]]
        folder = self._folder(step)
        try:
            self._write(folder, step, names, [micro for micro in told if micro < len(step.batches)], ids)
            kept = f"The batch is in {folder}; look at it with: mmkd check {folder}"
        except (OSError, SafetensorError) as error:
            kept = f"The batch could not be kept ({error})."
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        raise NotFiniteError(
            f"{self.where.role}, stage {self.where.stage}, step {step.number}: not finite: {', '.join(terms)}; samples "
            f"{', '.join(ids[:NAMED])}{more}. No student was written. {kept}"
        )

    def _folder(self, step: _Step) -> Path:
        other = f"_rank{rank()}" if rank() else ""
        return self.where.run / FOLDER / f"{self.where.role}_{self.where.stage}_step{step.number}{other}"

    def _write(self, folder: Path, step: _Step, names: Sequence[str], batches: Sequence[int], ids: Sequence[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number in batches:
            save_batch(step.batches[number], folder / f"batch_{number}")
        trained = self._trained()
        whole = trained is not None and not not_finite(trained.state_dict().items())
        if whole:
            save_model(trained, str(folder / WEIGHTS))
        report = {
            "role": self.where.role, "stage": self.where.stage, "step": step.number, "not_finite": list(names),
            "samples": list(ids), "batches": list(batches), "weights": whole, **step.facts,
            "recipe": dict(self.where.recipe),
        }  # fmt: skip
        write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")


def _send(step: _Step) -> None:
    """Sets a step's flags on their way to the host; on a CPU they are there."""
    if step.arrived is not None:
        return
    flags = torch.cat([flag.reshape(-1).to(step.flags[0].device) for flag in step.flags])
    if flags.device.type == "cpu":
        step.arrived = (flags, None)
        return
    there = flags.to("cpu", non_blocking=True)
    event = torch.cuda.Event() if flags.device.type == "cuda" else None
    if event is not None:
        event.record()
    else:
        torch.accelerator.synchronize()
    step.arrived = (there, event)
