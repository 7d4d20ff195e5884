"""A stage of preference terms: chosen and rejected answers to the same prompt, with the teacher as the reference.

    student: one look at the pictures, two readings (chosen, rejected) -> a summed log-probability each
    teacher: the same, once for all and from disk (`mmkd.train.reference`)
    term:    a function of the four, summed over pairs, divided by the global count of pairs

Other terms of the stage count on the chosen answers. Source: LLaVA-MoD (arXiv 2408.15881), preference distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkd.data.preference import rejected_of
from mmkd.data.samples import Sample
from mmkd.engine.positions import COUNTS
from mmkd.engine.rows import row_log_probs
from mmkd.errors import SampleError
from mmkd.teachers.teacher import head_of
from mmkd.towers.experts import Routing, recorded_routing
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.train.batch import Batch, Pair
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.signals import BatchSignals
from mmkd.train.skips import Skip

LEFT_OUT_BY_TEACHER = "the teacher cannot prepare it"

# ---- pairs of answers ------------------------------------------------------------------------------------------------


@dataclass
class PreferencePair(Pair):
    """A `Pair` of the chosen answer; `rejected` has no pixels of its own, its pictures are the chosen's."""

    rejected: Encoded | None = None
    reference: Tensor | None = None  # [2] log-probabilities of the chosen and the rejected answer under the teacher

    def lengths(self) -> dict[str, int]:
        return super().lengths() | {"rejected": len(self.rejected.input_ids)}


@dataclass
class PreferenceBatch(Batch):
    """A `Batch` of the chosen answers, and what is compared with them.

    reference: [B, 2] log-probabilities under the teacher, on the CPU as counts are.
    """

    rejected: TowerInputs
    reference: Tensor

    @property
    def tokens(self) -> int:
        return super().tokens + int(self.on_host.rejected.attention_mask.sum())

    def _moved(self, verb: str, *given: Any, **options: Any) -> PreferenceBatch:
        chosen = super()._moved(verb, *given, **options)
        rejected = getattr(replace(self.rejected, pixels={}), verb)(*given, **options)
        return replace(chosen, rejected=replace(rejected, pixels=chosen.student.pixels))


class PreferenceDataset(PairDataset):
    """Pairs as the student prepares them; `reference` [N, 2] is filled by `mmkd.train.reference` before training."""

    def __init__(self, samples: Sequence[Sample], *args: Any, **options: Any):
        super().__init__(samples, *args, **options)
        self.reference = torch.full((len(samples), 2), torch.nan, dtype=torch.float64)

    @property
    def collator(self) -> PreferenceCollator:
        return PreferenceCollator(self.student, self.teachers, self.next_usable)

    def __getitem__(self, index: int) -> PreferencePair | Skip:
        if torch.isinf(self.reference[index]).any():
            return Skip(index, self.samples[index].id, LEFT_OUT_BY_TEACHER, LEFT_OUT_BY_TEACHER)
        pair = super().__getitem__(index)
        return pair if isinstance(pair, Skip) else replace(pair, reference=self.reference[index])

    def leave_out(self, index: int) -> None:
        """Skips a pair from now on; said in `reference`, whose rows processes add up."""
        self.reference[index] = torch.inf

    def _prepare(self, sample: Sample, *, keep: bool) -> PreferencePair:
        pair = super()._prepare(sample, keep=keep)
        rejected = encode_rejected(self.student, sample, pair.student)
        if rejected.truncated:
            self.truncated[f"{sample.id} (rejected)"] = rejected.truncated
        return PreferencePair(pair.student, pair.teachers, rejected)


def encode_rejected(tower: Tower, sample: Sample, chosen: Encoded) -> Encoded:
    """The rejected answer in a tower's terms, without the pixels that it shares with the chosen one.

    Raises SampleError where both become the same tokens.
    """
    rejected = tower.encode(rejected_of(sample))
    if torch.equal(chosen.input_ids, rejected.input_ids):
        raise SampleError(
            f"sample {sample.id!r}: chosen and rejected answer are the same {len(chosen.input_ids)} tokens, so nothing can be "
            f"preferred; they may differ only behind max_length {tower.max_length}. Raise it or leave the pair out"
        )
    return replace(rejected, pixels={})


@dataclass
class PreferenceCollator(Collator):
    """Pads pairs into a `PreferenceBatch`."""

    def __call__(self, pairs: Sequence[PreferencePair | Skip]) -> dict[str, PreferenceBatch]:
        kept = self.kept(pairs)
        chosen = super().__call__(kept)["batch"]
        chosen.counts[COUNTS.index("pair")] = len(kept)
        rejected = collate_rejected(self.student, [pair.rejected for pair in kept], chosen.student)
        reference = torch.stack([pair.reference for pair in kept])  # [B, 2]
        skipped = [skip for skip in pairs if isinstance(skip, Skip)]
        batch = PreferenceBatch(chosen.student, chosen.teachers, chosen.counts, rejected, reference, skipped=skipped)
        return {"batch": batch}


def collate_rejected(tower: Tower, rejected: Sequence[Encoded], chosen: TowerInputs) -> TowerInputs:
    """Rejected answers as a batch that reads the pictures of the chosen ones."""
    return replace(tower.collate(rejected), pixels=chosen.pixels)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def answer_log_probs(tower: Tower, inputs: TowerInputs, hidden: Tensor, chunk_bytes: int) -> Tensor:
    """Summed log-probability of each sample's last answer; hidden [B, L, D] as from `read`. [B]

    The normaliser runs over the tokenizer's ids, without padding rows of the head (LLaVA-MoD's code has them in).
    """
    where = last_answer(inputs)  # [B, L]
    vocabulary = min(tower.vocabulary, tower.head.weight.shape[0])
    values = row_log_probs(
        hidden[where], head_of(tower), inputs.targets[where], vocabulary=vocabulary, chunk_bytes=chunk_bytes
    )  # [R]
    return values.new_zeros(where.shape).masked_scatter(where, values).sum(1)


def last_answer(inputs: TowerInputs) -> Tensor:
    """Rows that predict the last answer; earlier ones of a conversation belong to the prompt. [B, L] bool"""
    response = inputs.response
    begins = response & ~F.pad(response[:, :-1], (1, 0))
    answer = begins.long().cumsum(1)  # [B, L]
    return response & (answer == answer[:, -1:])


# ---- signals ---------------------------------------------------------------------------------------------------------


class PairSignals(BatchSignals):
    """The passes over the chosen answers, and the log-probabilities of both."""

    batch: PreferenceBatch

    @cached_property
    def log_probs(self) -> Tensor:
        """Of chosen and rejected answers under the student. [2, B]"""
        batch, chunk_bytes = self.batch, self.chunk_bytes
        return torch.stack([
            answer_log_probs(self.student, batch.student, self.hidden(), chunk_bytes),
            answer_log_probs(self.student, batch.rejected, self._rejected[0], chunk_bytes),
        ])

    @cached_property
    def _rejected(self) -> tuple[Tensor, dict[int, Routing]]:
        """Hidden states of the rejected answers, and how a sparse student routed them."""
        with recorded_routing(self.student) as routing:
            return self.student.read(self.batch.rejected, self.seen), routing  # [B, Lr, D]

    def routing(self) -> list[tuple[TowerInputs, dict[int, Routing]]]:
        return [*super().routing(), (self.batch.rejected, self._rejected[1])]

    def routed(self) -> dict[int, Tensor]:
        """Places that experts got in both readings."""
        places = super().routed()
        if places and "_rejected" in self.__dict__:
            mask = self.batch.rejected.attention_mask.flatten().bool()
            places = {layer: places[layer] + found.tokens(mask) for layer, found in self._rejected[1].items()}
        return places

    @cached_property
    def reference(self) -> Tensor:
        """The same under the teacher. [2, B]"""
        return self.batch.reference.T.to(self.log_probs.dtype).to(self.log_probs.device)
