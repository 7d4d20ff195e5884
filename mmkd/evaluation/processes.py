"""Several processes on one evaluation, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mmkd.base.distributed import world_size

T = TypeVar("T")

_ROUNDS = 8  # times that each process gets a run of batches
_PATIENCE = timedelta(days=1)  # how long one process waits for the slowest


@dataclass(frozen=True)
class Processes:
    """This process among `count` that do one evaluation together; process 0 writes the results."""

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """Those that a launcher started, connected to one another; one process without a launcher.

        Objects go over gloo, also between GPUs: what is exchanged are texts, once an evaluation.
        """
        if world_size() == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """This process's part of batches that are sorted by length.

        Runs of neighbours are dealt out in turn: long and short ones to everybody, and few pictures with questions in
        batches of two processes.
        """
        run = max(1, math.ceil(len(batches) / (self.count * _ROUNDS)))
        return [batch for place, batch in enumerate(batches) if place // run % self.count == self.index]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order."""
        if self.count == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Takes the connection down; afterwards the process can end."""
        if self.count > 1:
            import torch

            torch.distributed.destroy_process_group()


ALONE = Processes()
