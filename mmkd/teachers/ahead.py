"""The teachers' passes over the next micro-batch, begun before the student works on this one.

On CUDA they run on a stream of their own: a large teacher's kernels fill the device while the host still hands out the many small
ones of a tiny student. Elsewhere the passes come one after another, in this order. The price is memory: the teacher's
activations stand beside the student's, and what it says of one more micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Ahead:
    """Gives micro-batches on the device with the teachers' passes over them.

    prefetch: a batch on the device -> the same with the passes in it (`Distiller.prefetch`).
    half: the half precision of the autocast that the passes are under, as the step is; None for none.
    """

    def __init__(self, prefetch: Callable[[Any], Any], device: torch.device, half: torch.dtype | None):
        self.prefetch, self.device, self.half = prefetch, device, half
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[Any, Any] | None = None  # as it came from the loader, and with the pass

    def take(self, batch: Any, following: Any | None) -> Any:
        """The batch with the pass over it, done or under way, after that over the `following` one has begun."""
        begun, self._begun = self._begun, None
        ready = begun[1] if begun is not None and begun[0] is batch else self._begin(batch)
        if self.stream is not None:
            own = torch.cuda.current_stream(self.device)
            own.wait_stream(self.stream)
            for tensor in tensors_of(ready):
                if tensor.is_cuda:
                    tensor.record_stream(own)  # its memory is not given away before this stream is done with it
        if following is not None:
            self._begun = (following, self._begin(following))
        return ready

    def _begin(self, batch: Any) -> Any:
        with self._aside():
            moved = batch.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, self.half) if self.half is not None else nullcontext():
                return self.prefetch(moved)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # never more than a step before the student
        with torch.cuda.stream(self.stream):
            yield


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors within dataclasses, dicts and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
