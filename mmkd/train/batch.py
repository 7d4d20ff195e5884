"""One batch as student and teachers get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.samples import Sample
from mmkd.engine.positions import COUNTS
from mmkd.teachers.teacher import TeacherSignals
from mmkd.towers.tower import Encoded, TowerInputs
from mmkd.train.skips import Skip


@dataclass
class TeacherPart:
    """One sample as a teacher prepares it; `switch`: the same with the student's number of visual tokens."""

    inputs: Any = None  # what the teacher's `prepare` gave
    switch: Encoded | None = None


@dataclass
class Pair:
    """One sample as student and teachers prepare it."""

    student: Encoded
    teachers: dict[str, TeacherPart] = field(default_factory=dict)
    index: int = field(default=-1, kw_only=True)  # the sample's place in the data; -1 for one that has none
    # Where answers will be generated: the sample, and its prompt as each of "student" and the teachers prepares it.
    sample: Sample | None = field(default=None, kw_only=True, repr=False)
    prompts: dict[str, Encoded] = field(default_factory=dict, kw_only=True)
    facts: dict[str, Any] = field(default_factory=dict, kw_only=True)  # by term, what `Term.sample_fact` says of the sample

    def lengths(self) -> dict[str, int]:
        """Tokens of each sequence that a model reads of it, visual ones included."""
        found = {"student": len(self.student.input_ids)}
        for name, part in self.teachers.items():
            for reading, encoded in ((name, part.inputs), (f"{name} switched", part.switch)):
                if isinstance(encoded, Encoded):
                    found[f"of {reading}"] = len(encoded.input_ids)
        return found


@dataclass
class TeacherBatch:
    """A batch as one teacher gets it.

    inputs: of its `collate`.  switch: the samples with pictures, for the visual switch.
    ahead: what it said of the batch already, before the step.
    """

    inputs: Any
    switch: TowerInputs | None = None
    ahead: TeacherSignals | None = field(default=None, repr=False)


@dataclass
class Batch:
    """What the distiller gets. `counts` [len(COUNTS)] are this micro-batch's; the global ones divide the loss.

    Counts stay on the CPU, and a batch on an accelerator keeps the one that it was moved from (`on_host`): which rows a term
    names is asked there, since an answer from the accelerator would have to be waited for.
    """

    student: TowerInputs
    teachers: dict[str, TeacherBatch]
    counts: Tensor
    # By term, what its `step_sums` gave over all micro-batches and processes of the step; {} where this batch is the step.
    step_sums: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    facts: dict[str, list[Any]] = field(default_factory=dict, kw_only=True)  # by term, one a sample
    skipped: list[Skip] = field(default_factory=list, kw_only=True)  # samples that were to be in it
    host: Batch | None = field(default=None, kw_only=True, repr=False)

    @property
    def on_host(self) -> Batch:
        return self if self.host is None else self.host

    @property
    def teacher(self) -> Any:
        """The inputs of the only teacher."""
        return next((part.inputs for part in self.teachers.values()), None)

    @property
    def switch(self) -> TowerInputs | None:
        """The inputs of the visual switch; one teacher at the most has them."""
        return next((part.switch for part in self.teachers.values() if part.switch is not None), None)

    @property
    def tokens(self) -> int:
        """Tokens that the student reads, without padding."""
        return int(self.counts[COUNTS.index("token")])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return replace(self._moved("to", device, non_blocking=non_blocking), host=self.on_host)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which `non_blocking` copies are; the data loader calls it."""
        return self._moved("pin_memory")

    def _moved(self, verb: str, *given: Any, **options: Any) -> Batch:
        """The batch with all inputs moved; what student and teacher share stays shared."""
        student = getattr(self.student, verb)(*given, **options)

        def move(inputs: Any) -> Any:
            if inputs is None or inputs is self.student:
                return student if inputs is not None else None
            return getattr(inputs, verb)(*given, **options)

        teachers = {name: TeacherBatch(move(part.inputs), move(part.switch)) for name, part in self.teachers.items()}
        return replace(self, student=student, teachers=teachers)


@contextmanager
def naming_samples(batch: Batch) -> Iterator[None]:
    """Whatever is raised within says for which samples (from Python 3.11 on): a model may fail on one picture in a million."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            ids, length = batch.student.ids, batch.student.input_ids.shape[1]
            more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
            error.add_note(f"in the micro-batch of {', '.join(ids[:8])}{more}, of {length:,} tokens with padding (the student's)")
        raise
