"""CPRD's training step: a dual encoder learns the order in which a cross-encoder ranks its hard negatives (arXiv 2407.07479).

One step, both directions alike:

    embed the batch -> gather it from all processes -> similarities of my queries to the whole pool
      contrastive loss over the pool
      hard negatives, mined by these similarities -> the teacher's scores -> contrastive partial ranking

Each process computes the losses of its own queries against the gathered pool, so that two processes give the result of one
(tested).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkd.losses import contrastive, contrastive_partial_ranking, hard_negatives, valid_negatives
from mmkd.retrieval.augment import augmented
from mmkd.retrieval.batches import PairBatch, Sums
from mmkd.retrieval.dual_encoders import DualEncoder
from mmkd.retrieval.pairs import PairSet
from mmkd.retrieval.recipe import AugmentSpec, RankingSpec
from mmkd.retrieval.score_table import ScoreTable


class RankingModel(nn.Module):
    """Student and losses in one module, which data-parallel wrappers wrap. Without `scores` the loss is contrastive alone."""

    def __init__(
        self,
        student: DualEncoder,
        pairs: PairSet,
        spec: RankingSpec,
        scores: ScoreTable | None = None,
        augment: AugmentSpec | None = None,
    ):
        super().__init__()
        self.student = student
        self.pairs, self.spec, self.table, self.augment = pairs, spec, scores, augment

    def forward(self, batch: PairBatch) -> tuple[Tensor, Sums]:
        """The loss of this process's queries, divided by the number of all; and {term: (sum, count)} for the log.

        Summed over the processes it is the loss of the whole batch.
        """
        if self.training:
            self.student.clamp_temperature()
        images = self.student.embed_images(augmented(batch.pixels, self.augment if self.training else None))  # [B, D]
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
        self, queries: Tensor, pool: Tensor, positives: Tensor, own: Tensor, others: Tensor, images_query: bool
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
        pairs = own[:, None].expand_as(mined), others[mined.clamp(min=0)]
        scores = self.table.scores(*(pairs if images_query else pairs[::-1])).to(mined.device)  # [B, K]
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
    """Factor that makes a mean over all queries one over those with a valid negative, counted over all processes."""
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
    """All processes' rows in the order of their ranks. The gradient of my rows is summed over the processes."""

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
