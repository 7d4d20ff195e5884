"""The signals that a term may ask for.

A term lists in `needs` what it compares. The distiller computes the union of all needs, each once a batch, and the term reads
them by name: `signals["student.features"]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.engine.rows import Head
from mmkd.teachers.teacher import Teacher, head_of
from mmkd.towers.tower import Tower, TowerInputs

SIGNALS = {
    "student.rows": "hidden rows of the student at the term's positions, for the row engine; read by a term, a `terms.term.Rows`",
    "student.hidden": "last hidden states of the student. [B, L, Ds]",
    "student.visual_rows": "hidden rows of the student at the visual tokens, one [N, Ds] an image",
    "student.features": "vision features before the projector, one [n_i, Dv] an image",
    "student.tokens": "visual tokens after the projector, one [n_i, D] an image",
    "student.gram": "Gram matrix of the student's head, over the shared vocabulary. [Ds, Ds] and what a bias adds",
    "student.routing": "of each reading of a sparse student (inputs, routing by layer)",
    "teacher.rows": "hidden rows of the teacher at the term's positions and its head, or what a top-k cache keeps of its logits",
    "teacher.hidden": "last hidden states of the teacher. [B, L, Dt]",
    "teacher.visual_rows": "hidden rows of the teacher at the visual tokens, one [N, Dt] an image",
    "teacher.features": "the teacher's vision features, one [n_i, Dv] an image",
    "teacher.gram": "Gram matrix of the teacher's head",
    "switch.rows": "hidden rows of the teacher's language model on the student's vision features (the visual switch)",
    "pair.log_probs": "log-probabilities of the chosen and the rejected answer under the student. [2, B]",
    "pair.reference": "the same under the teacher, computed once and kept on disk. [2, B]",
}


class Signals(ABC):
    """What one term sees of one batch."""

    extra: nn.Module | None  # what the term trains or carries beside the student (`Term.extra`)
    prepared: Any  # what `Term.prepare` gave
    student: Tower
    teacher: Teacher | None  # the one that the term compares with
    inputs: TowerInputs  # the student's, on the CPU: masks, targets, images of each sample
    teacher_inputs: TowerInputs | None  # the live teacher's, on the CPU
    counts: dict[str, Tensor]  # this micro-batch's own, by name (mmkd.engine.positions)
    global_counts: dict[str, Tensor]  # of the whole step
    step_sums: Tensor | None  # see `Term.step_sums`
    vocabulary: int  # columns that both heads share
    chunk_bytes: int  # budget for logits and what is computed from them
    progress: float  # 0..1 of the stage
    facts: Sequence[Any]  # what `Term.sample_fact` gave, one a sample

    @abstractmethod
    def __getitem__(self, name: str) -> Any:
        """A signal that the term lists in its `needs`. Raises TowerError for another one."""

    @abstractmethod
    def of(self, teacher: str) -> Signals:
        """The same batch beside another of the stage's teachers, for a term that reads several (`Term.several`)."""

    @abstractmethod
    def observe(self, name: str, total: Tensor, count: Tensor) -> None:
        """Adds a mean, as (sum, count) of this micro-batch, to the log."""

    @property
    def head(self) -> Head:
        """The student's head."""
        return head_of(self.student)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def zero(self) -> Tensor:
        """A scalar 0 on the device."""
        return torch.zeros((), device=self.device)
