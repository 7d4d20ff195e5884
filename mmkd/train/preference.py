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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from mmkd.data.preference import rejected_of
from mmkd.data.samples import Sample
from mmkd.engine.rows import row_log_probs
from mmkd.errors import DataError
from mmkd.losses.preference import BETA
from mmkd.terms.term import KINDS, Term
from mmkd.towers.experts import Routing, recorded_routing
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.train.collate import COUNTS, Batch, Collator, Pair, PairDataset
from mmkd.train.distiller import Distiller, Signals, head_of
from mmkd.train.trainer import DistillTrainer

# ---- pairs of answers ------------------------------------------------------------------------------------------------


@dataclass
class PreferencePair(Pair):
    """A `Pair` of the chosen answer; `rejected` has no pixels of its own, its pictures are the chosen's."""

    rejected: Encoded | None = None
    reference: Tensor | None = None  # [2] log-probabilities of the chosen and the rejected answer under the teacher


@dataclass
class PreferenceBatch(Batch):
    """A `Batch` of the chosen answers, and what is compared with them.

    reference: [B, 2] log-probabilities under the teacher, on the CPU as counts are.
    kl: [2] paired KTO's reference points over the whole step; None where this batch is the whole step.
    """

    rejected: TowerInputs
    reference: Tensor
    kl: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        chosen = super().to(device, non_blocking)
        rejected = replace(self.rejected, pixels={}).to(device, non_blocking=non_blocking)
        rejected = replace(rejected, pixels=chosen.student.pixels)
        return PreferenceBatch(
            chosen.student, chosen.teacher, chosen.switch, chosen.counts, rejected, self.reference, self.kl,
            said=chosen.said, host=chosen.host,
        )


class PreferenceDataset(PairDataset):
    """Pairs as the student prepares them; `reference` [N, 2] is filled by `mmkd.train.reference` before training."""

    def __init__(self, samples: Sequence[Sample], *args: Any, **options: Any):
        super().__init__(samples, *args, **options)
        self.reference = torch.full((len(samples), 2), torch.nan, dtype=torch.float64)

    @property
    def collator(self) -> PreferenceCollator:
        return PreferenceCollator(self.student, self.teacher)

    def __getitem__(self, index: int) -> PreferencePair | None:
        pair = super().__getitem__(index)
        return None if pair is None else replace(pair, reference=self.reference[index])

    def _prepare(self, sample: Sample) -> PreferencePair | None:
        pair = super()._prepare(sample)
        if pair is None:
            return None
        rejected = encode_rejected(self.student, sample, pair.student)
        if rejected.truncated:
            self.truncated[f"{sample.id} (rejected)"] = rejected.truncated
        return PreferencePair(pair.student, pair.teacher, pair.switch, rejected)


def encode_rejected(tower: Tower, sample: Sample, chosen: Encoded) -> Encoded:
    """The rejected answer in a tower's terms, without the pixels that it shares with the chosen one.

    Raises DataError where both become the same tokens.
    """
    rejected = tower.encode(rejected_of(sample))
    if torch.equal(chosen.input_ids, rejected.input_ids):
        raise DataError(
            f"sample {sample.id!r}: chosen and rejected answer are the same {len(chosen.input_ids)} tokens, so nothing can be "
            f"preferred; they may differ only behind max_length {tower.max_length}. Raise it or leave the pair out"
        )
    return replace(rejected, pixels={})


@dataclass
class PreferenceCollator(Collator):
    """Pads pairs into a `PreferenceBatch`."""

    def __call__(self, pairs: Sequence[PreferencePair | None]) -> dict[str, PreferenceBatch]:
        chosen = super().__call__(pairs)["batch"]
        kept = [pair for pair in pairs if pair is not None]
        chosen.counts[COUNTS.index("pair")] = len(kept)
        rejected = collate_rejected(self.student, [pair.rejected for pair in kept], chosen.student)
        reference = torch.stack([pair.reference for pair in kept])  # [B, 2]
        batch = PreferenceBatch(
            chosen.student, chosen.teacher, chosen.switch, chosen.counts, rejected, reference, said=chosen.said
        )
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


# ---- the loss --------------------------------------------------------------------------------------------------------


class PreferenceDistiller(Distiller):
    """A `Distiller` whose batches are pairs of answers."""

    def forward(
        self, batch: PreferenceBatch, counts: Tensor | None = None, progress: Tensor | float = 0.0, ratios_only: bool = False
    ) -> Any:
        """As `Distiller.forward`; with `ratios_only`, the summed log-ratios of chosen and rejected answers alone. [2]"""
        if ratios_only:
            return self.signals(batch).log_ratios.sum(1)
        return super().forward(batch, counts, progress)

    def signals(self, batch: PreferenceBatch) -> PreferenceSignals:
        return PreferenceSignals(self, batch)

    def _image_loss(self, signals: PreferenceSignals, term: Term) -> Tensor:
        return signals.preference(term) if term.is_preference else super()._image_loss(signals, term)


class PreferenceSignals(Signals):
    """`Signals` of the chosen answers, and the log-probabilities of both."""

    @cached_property
    def log_probs(self) -> Tensor:
        """Of chosen and rejected answers under the student. [2, B]"""
        batch, chunk_bytes = self.batch, self.distiller.chunk_bytes
        return torch.stack([
            answer_log_probs(self.student, batch.student, self.student_hidden, chunk_bytes),
            answer_log_probs(self.student, batch.rejected, self.rejected_read[0], chunk_bytes),
        ])

    @cached_property
    def rejected_read(self) -> tuple[Tensor, dict[int, Routing]]:
        """Hidden states of the rejected answers, and how a sparse student routed them."""
        with recorded_routing(self.student) as routing:
            return self.student.read(self.batch.rejected, self.student_seen), routing  # [B, Lr, D]

    def load_balance(self) -> Tensor:
        """That of the chosen plus that of the rejected answers (as in LLaVA-MoD's code), each a mean over its own tokens."""
        return super().load_balance() + self._balance(self.batch.rejected, self.rejected_read[1])

    def routed(self) -> dict[int, Tensor]:
        """Places that experts got in both readings."""
        places = super().routed()
        if places and "rejected_read" in self.__dict__:
            mask = self.batch.rejected.attention_mask.flatten().bool()
            places = {layer: places[layer] + found.tokens(mask) for layer, found in self.rejected_read[1].items()}
        return places

    @cached_property
    def reference(self) -> Tensor:
        """The same under the teacher. [2, B]"""
        return self.batch.reference.T.to(self.log_probs.dtype).to(self.log_probs.device)

    @property
    def log_ratios(self) -> Tensor:
        """r(y) = log p_student(y) - log p_teacher(y) of chosen and rejected answers. [2, B]"""
        return self.log_probs - self.reference

    def preference(self, term: Term) -> Tensor:
        """Sum over pairs of a preference term."""
        options = dict(term.options)
        self._observe(term.name, options.get("beta", BETA))
        if term.kind == "kto_pair" and self.batch.kl is not None:
            options["kl"] = self.batch.kl.to(self.log_probs.device).unbind()
        values = KINDS[term.kind].function(*self.log_probs, *self.reference, **options)
        return values.sum() * (self.log_probs.shape[1] / len(values))  # paired KTO gives two values a pair

    def _observe(self, name: str, beta: float) -> None:
        """Rewards `beta r(y)`, their margin, and the share of pairs in which the chosen one's is the higher."""
        rewards = beta * self.log_ratios.detach()  # [2, B]
        chosen, rejected = rewards
        pairs = torch.tensor(float(len(chosen)))
        self.observed |= {
            f"{name}_margin": ((chosen - rejected).sum(), pairs),
            f"{name}_accuracy": ((chosen > rejected).float().sum(), pairs),
            f"{name}_chosen_reward": (chosen.sum(), pairs),
            f"{name}_rejected_reward": (rejected.sum(), pairs),
        }


# ---- the loop --------------------------------------------------------------------------------------------------------


class PreferenceTrainer(DistillTrainer):
    """The loop of a preference stage. Paired KTO needs means over the whole step: where micro-batches or processes share
    a step, a pass without gradient finds them first, so that the split changes nothing (our choice; LLaVA-MoD's code takes
    each micro-batch of a process for itself)."""

    def __init__(self, distiller: PreferenceDistiller, *args: Any, **options: Any):
        super().__init__(distiller, *args, **options)
        self.kto = [term for term in distiller.terms if term.kind == "kto_pair"]
        _check_kl(self.kto, self.args)

    def _count_experts(self, model: nn.Module, batch: PreferenceBatch) -> None:
        read = int(batch.student.attention_mask.sum()) + int(batch.rejected.attention_mask.sum())
        self._experts.add(self.accelerator.unwrap_model(model).routed, read)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        counts = super()._get_num_items_in_batch(batch_samples, device)
        if self.kto and (len(batch_samples) > 1 or self.args.world_size > 1):
            kl = self._reference_points(batch_samples, float(counts[COUNTS.index("pair")]))
            for inputs in batch_samples:
                inputs["batch"].kl = kl
        return counts

    @torch.no_grad()
    def _reference_points(self, batch_samples: list, pairs: float) -> Tensor:
        """`max(0, mean r(y))` of the chosen and of the rejected answers of a step. [2]"""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        ratios = torch.zeros(2, device=self.args.device)
        for inputs in batch_samples:
            with self.compute_loss_context_manager():
                ratios += model(**self._prepare_inputs(inputs), ratios_only=True)
        model.train(was_training)
        if self.args.world_size > 1:
            ratios = self.accelerator.reduce(ratios, reduction="sum")
        return (ratios / max(1.0, pairs)).clamp(min=0).cpu()


def _check_kl(kto: Sequence[Term], arguments: TrainingArguments) -> None:
    attached = [term.name for term in kto if not dict(term.options).get("detach_kl", True)]
    if attached and arguments.gradient_accumulation_steps * arguments.world_size > 1:
        raise DataError(
            f"terms.{attached[0]}.detach_kl is false, but a step is {arguments.gradient_accumulation_steps} micro-batches in "
            f"{arguments.world_size} processes, and a gradient cannot pass between them; use one process and "
            "micro_batch_size = batch_size, or detach_kl: true"
        )
