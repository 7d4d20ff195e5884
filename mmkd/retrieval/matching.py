"""Trains a cross-encoder to match pictures with texts: the teacher of a ranking run where none exists.

ALBEF's recipe (arXiv 2107.07651), which BLIP follows: an image-text contrastive loss on the unimodal embeddings, and a matching
loss on true pairs and on hard negatives that are drawn by the contrastive similarities. No momentum model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.data.samples import ImageRef
from mmkd.losses import contrastive
from mmkd.retrieval.augment import augmented
from mmkd.retrieval.batches import PairBatch, PairDataset, Sums
from mmkd.retrieval.cross_encoders import MatchingEncoder
from mmkd.retrieval.dual_encoders import TEMPERATURE_RANGE, Inputs
from mmkd.retrieval.pairs import PairSet
from mmkd.retrieval.recipe import AugmentSpec


class MatchingDataset(PairDataset):
    """The pairs of a set, prepared for the cross-encoder."""

    def prepare_images(self, images: Sequence[ImageRef]) -> Inputs:
        return {"pixels": self.model.pixels(images)}

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        return self.model.tokens(texts)


class MatchingModel(nn.Module):
    """The cross-encoder with its two losses."""

    def __init__(
        self,
        encoder: MatchingEncoder,
        pairs: PairSet,
        negatives: int = 1,
        temperature: float = 0.07,
        augment: AugmentSpec | None = None,
    ):
        super().__init__()
        self.encoder, self.pairs, self.negatives, self.augment = encoder, pairs, negatives, augment
        self.model = encoder.model
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def forward(self, batch: PairBatch) -> tuple[Tensor, Sums]:
        """Contrastive plus matching loss, means over the batch; and {term: (sum, count)} for the log."""
        size = len(batch.images)
        states = self.encoder.states(augmented(batch.pixels, self.augment if self.training else None)["pixels"])  # [B, N, Dv]
        positives = self.pairs.match(batch.images, batch.texts)  # [B, B]
        similarities = self.encoder.similarities(states, batch.tokens)  # [B, B]
        temperature = (-self.log_scale).exp().clamp(*TEMPERATURE_RANGE)
        itc = contrastive(similarities, positives, temperature) + contrastive(similarities.T, positives.T, temperature)  # [B]
        logits = (similarities / temperature).detach()
        own = torch.arange(size, device=states.device)
        repeated = own.repeat_interleave(self.negatives)
        images = torch.cat([own, repeated, draw_negatives(logits.T, positives.T, self.negatives)])  # [P]
        texts = torch.cat([own, draw_negatives(logits, positives, self.negatives), repeated])  # [P]
        truth = positives[images, texts].float()  # a query without any negative in the batch draws a positive
        odds = self.encoder.match(states[images], {name: ids[texts] for name, ids in batch.tokens.items()})  # [P]
        itm = F.binary_cross_entropy_with_logits(odds, truth, reduction="sum")
        pairs = torch.tensor(float(len(images)))
        right = ((odds > 0) == truth.bool()).float().sum()
        log = {
            "contrastive": (itc.sum(), torch.tensor(2.0 * size)),
            "matching": (itm, pairs),
            "matching_accuracy": (right, pairs),
        }
        return itc.mean() / 2 + itm / len(images), log


def draw_negatives(logits: Tensor, positives: Tensor, count: int) -> Tensor:
    """Columns drawn for each row by its softmax without the positives. [B, M] -> [B * count]

    A row whose columns are all positives draws among these.
    """
    weights = logits.masked_fill(positives, -torch.inf)
    weights = torch.where(positives.all(-1, keepdim=True), 0.0, weights).softmax(-1)
    # A little of everything, so that a row can be drawn from `count` times however peaked it is.
    allowed = (~positives | positives.all(-1, keepdim=True)).float()
    return torch.multinomial(weights + 1e-4 * allowed, count, replacement=True).flatten()
