"""CPRD's training step: a dual encoder learns the order in which a cross-encoder ranks its hard negatives (arXiv 2407.07479).

One step, both directions alike:

    embed the batch -> gather it from all processes -> similarities of my queries to the whole pool
      contrastive loss over the pool
      hard negatives, mined by these similarities -> the teacher's scores -> contrastive partial ranking

Every process takes the losses of its own queries against the gathered pool, so that two processes are one (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from mmkd.data.samples import ImageRef
from mmkd.losses import contrastive, contrastive_partial_ranking, hard_negatives, valid_negatives
from mmkd.retrieval.augment import augmented
from mmkd.retrieval.cross_encoders import ScoreTable
from mmkd.retrieval.dual import DualEncoder, Inputs
from mmkd.retrieval.pairs import PairSet
from mmkd.train.guards import freeze_unreached_by
from mmkd.train.trainer import DistillTrainer

PIXEL_BYTES = 2**29  # prepared pictures that are kept in memory, about

Sums = dict[str, tuple[Tensor, Tensor]]  # {term: (sum, count)}


@dataclass
class PairBatch:
    """A batch of pairs in the student's terms; `images` and `texts` are their numbers in the pair set. [B]"""

    images: Tensor
    texts: Tensor
    pixels: Inputs
    tokens: Inputs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        def move(inputs: Inputs) -> Inputs:
            return {k: v.to(device, non_blocking=non_blocking) for k, v in inputs.items()}

        return PairBatch(self.images.to(device), self.texts.to(device), move(self.pixels), move(self.tokens))


class PixelCache:
    """Prepared pictures by number: kept in memory, since preparing small pictures takes longer than a step with them."""

    def __init__(self, images: Sequence[ImageRef], prepare: Callable[[list[ImageRef]], Inputs]):
        self.images, self.prepare = images, prepare
        self._kept: dict[int, Inputs] = {}
        self._bytes = 0

    def __call__(self, numbers: Sequence[int]) -> Inputs:
        """Inputs of the pictures of these numbers, in their order."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        fresh = self._prepared(missing) if missing else {}
        rows = [fresh[number] if number in fresh else self._kept[number] for number in numbers]
        if self._bytes < PIXEL_BYTES:
            self._kept |= fresh
            self._bytes += sum(tensor.nbytes for row in fresh.values() for tensor in row.values())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _prepared(self, numbers: list[int]) -> dict[int, Inputs]:
        inputs = self.prepare([self.images[number] for number in numbers])
        return {number: {name: tensor[i] for name, tensor in inputs.items()} for i, number in enumerate(numbers)}


class PairDataset(Dataset):
    """The pairs of a set by number; `collate` loads and prepares them for the model that is trained."""

    def __init__(self, pairs: PairSet, model: Any):
        self.pairs, self.model = pairs, model
        self.pixels = PixelCache(pairs.images, self.prepare_images)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int]:
        image, text = self.pairs.pairs[index].tolist()
        return image, text

    def collate(self, numbers: Sequence[tuple[int, int]]) -> dict[str, PairBatch]:
        images, texts = ([n[i] for n in numbers] for i in (0, 1))
        tokens = self.prepare_texts([self.pairs.texts[t] for t in texts])
        return {"batch": PairBatch(torch.tensor(images), torch.tensor(texts), self.pixels(images), tokens)}

    def prepare_images(self, images: Sequence[ImageRef]) -> Inputs:
        """Pictures in the model's terms."""
        return self.model.prepare_images([image.load() for image in images])

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """Texts in the model's terms."""
        return self.model.prepare_texts(texts)


class RankingModel(nn.Module):
    """Student and losses in one module, which data-parallel wrappers wrap. Without `scores` the loss is contrastive alone."""

    def __init__(
        self, student: DualEncoder, pairs: PairSet, spec: Any, scores: ScoreTable | None = None, augment: Any = None
    ):
        """`spec` is the recipe's `ranking` (mmkd.retrieval.recipe.RankingSpec), `augment` its `training.augment`."""
        super().__init__()
        self.student = student
        self.pairs, self.spec, self.table, self.augment = pairs, spec, scores, augment

    def forward(self, batch: PairBatch, count: Any = None, progress: float = 0.0) -> tuple[Tensor, Sums]:
        """The loss of this process's queries, divided by the number of all; and {term: (sum, count)} for the log.

        Summed over the processes it is the loss of the whole batch.
        """
        if self.training:
            self.student.clamp_temperature()
        images = self.student.embed_images(augmented(batch.pixels, self))  # [B, D]
        texts = self.student.embed_texts(batch.tokens)  # [B, D]
        all_images, all_texts = gather(images), gather(texts)  # [M, D]
        image_numbers, text_numbers = gather(batch.images), gather(batch.texts)  # [M]
        terms = [
            self._direction(images, all_texts, self.pairs.match(batch.images, text_numbers), batch.images, text_numbers, True),
            self._direction(texts, all_images, self.pairs.match(image_numbers, batch.texts).T, batch.texts, image_numbers, False),
        ]
        # Half the mean over the queries of either direction is the mean over all of them.
        loss = sum(self._weighted(found) for found in terms) / (2 * len(all_images))
        names = terms[0].keys()
        log = {name: _join([found[name] for found in terms]) for name in names}
        return loss, log

    def _weighted(self, found: Sums) -> Tensor:
        total = found["contrastive"][0]
        return total + self.spec.weight * found["cprd"][0] if "cprd" in found else total

    def _direction(
        self, queries: Tensor, pool: Tensor, positives: Tensor, own: Tensor, others: Tensor, pictures_ask: bool
    ) -> Sums:
        """{term: (sum over my queries, count)} of one direction. `own` [B] and `others` [M] are numbers in the pair set."""
        similarities = queries.float() @ pool.float().T  # [B, M]
        temperature = self.student.temperature
        base = contrastive(similarities, positives, temperature).sum()
        number = torch.tensor(float(len(queries)))
        found = {"contrastive": (base, number)}
        if self.table is None:
            return found
        spec = self.spec
        mined = hard_negatives(similarities, positives, spec.candidates)  # [B, K]
        asked = own[:, None].expand_as(mined), others[mined.clamp(min=0)]
        scores = self.table.scores(*(asked if pictures_ask else asked[::-1])).to(mined.device)  # [B, K]
        choice = {"threshold": spec.threshold, "top_m": spec.top_m, "margin": spec.margin, "ceiling": spec.ceiling}
        ranking = contrastive_partial_ranking(
            similarities,
            scores,
            mined,
            temperature,
            **choice,
            rank_reduction=spec.rank_reduction,
            detach_temperature=spec.detach_temperature,
            easy=_easy(positives, mined) if spec.include_easy else None,
        )  # [B]
        valid = valid_negatives(scores, mined, **choice)  # [B]
        if spec.query_reduction == "with_valid":
            ranking = ranking * _share_of_valid(valid)
        return found | {"cprd": (ranking.sum(), number), "valid_negatives": (valid.sum().float(), number)}


def _share_of_valid(valid: Tensor) -> Tensor:
    """What turns a mean over all queries into one over those with a valid negative: all by with, over all processes."""
    counts = torch.tensor([len(valid), int((valid > 0).sum())], dtype=torch.float32, device=valid.device)
    if _world_size() > 1:
        torch.distributed.all_reduce(counts)
    return counts[0] / counts[1].clamp(min=1)


def _easy(positives: Tensor, mined: Tensor) -> Tensor:
    """Pool entries that are neither positive nor mined. [B, M] bool"""
    taken = positives.clone()
    rows = torch.arange(len(mined), device=mined.device)[:, None].expand_as(mined)
    taken[rows[mined >= 0], mined[mined >= 0]] = True
    return ~taken


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return sum(total.detach() for total, _ in parts), sum(count for _, count in parts)


# ---- processes -------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All processes' rows in the order of their ranks. Its gradient is the sum of what all processes want of my rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        first = torch.distributed.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, with gradient; every process has equally many. [B, ...] -> [W * B, ...]"""
    return _Gather.apply(rows) if _world_size() > 1 else rows


def _world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


# ---- the loop --------------------------------------------------------------------------------------------------------


class RankingTrainer(DistillTrainer):
    """Trains a `RankingModel`: the distiller's loop without its counts, since a ranking batch is never cut into pieces."""

    def __init__(self, model: RankingModel, dataset: PairDataset, training: Any, arguments: TrainingArguments, log: Path):
        super().__init__(model, dataset, training, arguments, log, collator=dataset.collate)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> Sampler | None:
        return Trainer._get_train_sampler(self, train_dataset)

    def _count_experts(self, model: nn.Module, batch: Any) -> None:
        """A dual encoder has none."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(self.model, self.stage.optimiser)
        return self.optimizer


def adamw(model: nn.Module, spec: Any) -> torch.optim.Optimizer:
    """AdamW without weight decay on norms, biases, the temperature and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas)


def freeze_unreached(model: nn.Module, batch: Any) -> list[str]:
    """Takes parameters that the loss does not reach out of training; data-parallel training would wait for them for ever."""
    model.train()
    loss, _ = model(batch)
    return freeze_unreached_by(model, loss)
