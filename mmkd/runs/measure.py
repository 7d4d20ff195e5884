"""What the steps of a stage take on this machine: most bytes at once, and seconds; weights stay as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from mmkd.data.lazy import is_lazy
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.teachers.ahead import tensors_of
from mmkd.towers.loading import half_of
from mmkd.towers.tower import Encoded
from mmkd.train.batch import Batch, Pair
from mmkd.train.build_stage import Stage
from mmkd.train.token_batches import padded, split
from mmkd.train.trainer import optimiser_of

SPREAD = 64  # samples, at least, that stand for all
MOST = 512  # and no more than so many where a micro-batch has fewer
SIZED = 20_000  # samples whose pictures' sizes are asked for
TIMED = 4  # micro-batches that are timed


@dataclass
class Measured:
    """bytes: the most that a step held at once beside weights and optimiser.  rows_of: the micro-batch that held it.

    held: its samples; fewer than a micro-batch where that did not fit the device (`bytes` is then scaled to the whole), 0 where
    not even one did.  micro_batches: of a step.  seconds: of a step.  teacher_seconds: of these, the teachers' passes.
    """

    bytes: int
    rows_of: Batch | None
    held: int
    micro_batches: int
    seconds: float
    teacher_seconds: float = 0.0


# ---- which samples ---------------------------------------------------------------------------------------------------


def spread_count(micro: int) -> int:
    """How many samples stand for all: some micro-batches of them, so that sorting by length shows."""
    return max(SPREAD, min(TIMED * micro, max(micro, MOST)))


def candidates(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Samples among which the largest are looked for: those with the most text, those with the most pixels, and others
    that are spread over the set, which stand for all of them (first in the list)."""
    wanted = spread_count(count)
    spread = list(samples[:: max(1, len(samples) // wanted)])[:wanted]
    some = samples[:: max(1, len(samples) // SIZED)] if not is_lazy(samples) else spread
    largest = [*sorted(some, key=_text, reverse=True)[:count], *sorted(some, key=_pixels, reverse=True)[:count]]
    known = {id(sample) for sample in spread}
    return spread + [s for s in {id(s): s for s in largest}.values() if id(s) not in known]


def _text(sample: Sample) -> int:
    return sum(len(turn.text) for turn in sample.turns)


def _pixels(sample: Sample) -> tuple[int, int]:
    """Pictures' pixels, by the heads of their files, and text."""
    found = 0
    for ref in sample.images:
        try:
            with Image.open(ref.file) as picture:
                found += picture.width * picture.height
        except (OSError, ValueError, AttributeError, Image.DecompressionBombError):  # in an archive, in memory or damaged
            found += 1
    return found, _text(sample)


def size(pair: Pair) -> tuple[int, int]:
    """What makes a sample large: tokens of all sequences, then pixel values."""
    own = [pair.student, *(part.inputs for part in pair.teachers.values())]
    pixels = sum(tensor.numel() for one in own if isinstance(one, Encoded) for tensor in one.pixels.values())
    return sum(pair.lengths().values()), pixels


def micro_batches(stage: Stage, pairs: Sequence[Pair], micro: int) -> list[list[Pair]]:
    """The pairs as micro-batches. micro: samples of one, where tokens do not tell."""
    tokens = stage.spec.optimiser.micro_batch_tokens
    if tokens is not None:
        groups = split([pair.lengths() for pair in pairs], [pair.student.images > 0 for pair in pairs], tokens)
        return [[pairs[n] for n in group] for group in groups]
    ordered = sorted(pairs, key=size) if stage.spec.order.kind == "length" else pairs
    return [list(ordered[n : n + micro]) for n in range(0, len(ordered) - micro + 1, micro)] or [list(ordered)]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(stage: Stage, spread: Sequence[Pair], largest: Sequence[Pair], micro: int, batch: int) -> Measured:
    """A stage's steps. spread: pairs that stand for all.  largest: from the largest down.  batch: samples of a step.

    Raises DataError for terms that reach no trained parameter.
    """
    meter = Meter(stage)
    by_tokens = stage.spec.optimiser.micro_batch_tokens is not None
    typical = micro_batches(stage, [spread[n % len(spread)] for n in range(batch)] if by_tokens else spread, micro)
    most = list(largest[:micro])
    if by_tokens:
        most = max(micro_batches(stage, largest, micro), key=lambda own: padded([pair.lengths() for pair in own]))
    count = len(typical) if by_tokens else max(1, batch // micro)
    found, held, taken = None, len(most), None
    while held and found is None:
        try:
            taken = stage.batch_from(most[:held])
            meter.step(taken)  # the optimiser's averages are there from now on
            found = meter.peak(taken, accumulated=count > 1) + (count + 1) * _bytes(taken, meter.device)
        except torch.OutOfMemoryError:
            pass
        if found is None:  # behind the exception, which holds what did not fit
            held //= 2
            meter.forget()
    if found is None:
        return Measured(0, None, 0, count, 0.0)
    if held < len(most):
        return Measured(round(found * len(most) / held), taken, held, count, 0.0)
    timed = [meter.seconds(stage, own) for own in typical[:: max(1, len(typical) // TIMED)]]
    passes, teachers = (float(np.mean(column)) for column in zip(*timed, strict=True))
    return Measured(found, taken, held, count, count * passes + meter.update(), count * teachers)


def _bytes(batch: Batch, device: torch.device) -> int:
    """Of a batch's own tensors. The loader has all of a step's micro-batches there, and begins with the next step's."""
    own = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_of(batch) if t.device.type == device.type}
    return sum(own.values())


class Meter:
    """Steps whose learning rate is 0."""

    def __init__(self, stage: Stage):
        self.distiller = stage.distiller
        self.device, self.half = stage.student.device, half_of(stage.spec.precision)
        self.distiller.train()
        still = {"weight_decay": 0.0, "learning_rate": 0.0, "learning_rates": {}}
        self.optimiser = optimiser_of(self.distiller, stage.spec.optimiser.model_copy(update=still))

    def passes(self, batch: Batch) -> None:
        """Forward and backward."""
        with torch.autocast(self.device.type, self.half) if self.half is not None else nullcontext():
            loss, _ = self.distiller(batch)
        if not loss.requires_grad:
            raise DataError("the terms reach no trained parameter; train the part that they act on")
        loss.backward()

    def step(self, batch: Batch) -> None:
        self.passes(batch)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def peak(self, batch: Batch, *, accumulated: bool) -> int:
        """Most bytes at once, gradients included. accumulated: whether gradients of other micro-batches are there before."""
        before = 0
        if accumulated:
            self.passes(batch)
            before = sum(p.grad.numel() * p.grad.element_size() for p in self.distiller.parameters() if p.grad is not None)
        found = before + bytes_given_out(self.device, lambda: self.step(batch))
        self.optimiser.zero_grad()
        return found

    def forget(self) -> None:
        """Lets go of what a step left that did not fit."""
        self.optimiser.zero_grad()
        self.optimiser.state.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, stage: Stage, pairs: Sequence[Pair]) -> tuple[float, float]:
        """Of the passes over a micro-batch, the second time, and of the teachers' among them."""
        begun = time.perf_counter()
        batch = stage.batch_from(pairs)
        answering = time.perf_counter() - begun if stage.answers.generates else 0.0
        self.passes(batch)
        taken = answering + self._time(lambda: self.passes(batch))
        self.optimiser.zero_grad()
        with torch.no_grad(), torch.autocast(self.device.type, self.half) if self.half is not None else nullcontext():
            live = [name for name, teacher in stage.teachers.items() if not (teacher.stored or teacher.remote)]
            teachers = self._time(lambda: self.distiller.prefetch(batch)) if live else 0.0
        return taken, min(teachers, taken)

    def update(self) -> float:
        """Seconds of the optimiser."""
        for parameter in self.distiller.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        found = self._time(self.optimiser.step)
        self.optimiser.zero_grad()
        return found

    def _time(self, function: Callable[[], object]) -> float:
        self._synchronise()
        started = time.perf_counter()
        function()
        self._synchronise()
        return time.perf_counter() - started

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def bytes_given_out(device: torch.device, function: Callable[[], object]) -> int:
    """Most bytes that the allocator had given out at once during a call, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = np.array([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return max(0, int(sizes.cumsum().max())) if len(sizes) else 0
