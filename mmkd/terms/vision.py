"""Terms on pictures: features, relations between visual tokens, and two that align a vision encoder from random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.bridge import Bridge
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Term

TOGETHER = 16  # images that a term takes at once: what it computes on the way has no more memory than that of so many


@register("terms", "feature_match")
@dataclass(frozen=True)
class FeatureMatch(Term):
    """Distance of the student's vision features to the teacher's, through a trained map; mean over images."""

    origin: ClassVar[str] = "FitNets (arXiv 1412.6550)"
    status: ClassVar[str] = "our choice: cosine, and resampling where token counts differ"
    needs: ClassVar[tuple[str, ...]] = ("student.features", "teacher.features")
    count: ClassVar[str] = "image"

    distance: Literal["cosine", "mse", "smooth_l1"] = "cosine"

    def extra(self, pair: Pair) -> nn.Module | None:
        return None if pair.teacher is None else Bridge(pair.student.feature_width, pair.teacher.feature_width)

    def loss(self, signals: Signals) -> Tensor:
        total = signals.zero
        for own, other in alike(signals["student.features"], signals["teacher.features"]):
            rows = losses.feature_match(signals.extra(own, other.shape[1]), other, self.distance)  # [n, N]
            total = total + rows.mean(-1).sum()
        return total

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        return signals.extra(features, len(features)).sum() * 0.0


@register("terms", "relation")
@dataclass(frozen=True)
class Relation(Term):
    """LLaVA-KD's RDist: one minus the cosine of the Gram matrices of visual tokens; mean over images."""

    origin: ClassVar[str] = "LLaVA-KD (arXiv 2410.16236), RDist"
    status: ClassVar[str] = "confirmed"
    count: ClassVar[str] = "image"
    default_weight: ClassVar[float] = 0.5

    source: Literal["logits", "hidden"] = "logits"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        rows = ("student.visual_rows", "teacher.visual_rows")
        return (*rows, "student.gram", "teacher.gram") if self.source == "logits" else rows

    def check(self, pair: Pair) -> list[str]:
        rules = [pair.student.logit_rule, *([pair.teacher.logit_rule] if pair.teacher is not None else [])]
        if self.source == "logits" and any(cap is not None for _, cap in rules):
            return [
                "relation goes through the heads' Gram matrices, which a soft cap on the logits does not allow; compare the "
                "hidden states themselves with `source: hidden`"
            ]
        return []

    def loss(self, signals: Signals) -> Tensor:
        grams = (signals["student.gram"], signals["teacher.gram"]) if self.source == "logits" else (None, None)
        total = signals.zero
        for own, other in alike(signals["student.visual_rows"], signals["teacher.visual_rows"]):
            total = total + losses.relation_from_hidden(own, grams[0], other, grams[1], self.source).sum()
        return total


@register("terms", "contrastive")
@dataclass(frozen=True)
class Contrastive(Term):
    """Image-text contrastive loss between visual tokens and the answer's embeddings; negatives are the micro-batch's.

    Similarity by late interaction (FILIP, arXiv 2111.07783): each answer token looks for its best visual token, in the language
    model's own embedding space; the mean over answer tokens. It teaches encoder, projector and embeddings that a visual token
    and the word for what it shows are near, which a language model's attention can use from the start.
    """

    origin: ClassVar[str] = "FILIP (arXiv 2111.07783), late interaction"
    status: ClassVar[str] = "our choice: the language model's own embeddings as texts"
    needs: ClassVar[tuple[str, ...]] = ("student.tokens",)
    count: ClassVar[str] = "pictured"

    @property
    def learns_answers(self) -> bool:
        return True

    def extra(self, pair: Pair) -> nn.Module:
        return Temperature()

    def loss(self, signals: Signals) -> Tensor:
        inputs = signals.inputs
        pictured = [b for b, n in enumerate(inputs.images) if n]
        if not pictured:
            return signals.zero
        first = [sum(inputs.images[:b]) for b in pictured]  # a sample's first image stands for it
        groups, order = _grouped([signals["student.tokens"][i] for i in first])
        answers, given = (x.to(signals.device, non_blocking=True) for x in _packed(inputs.targets[pictured]))  # [n, T]
        words = F.normalize(signals.student.model.get_input_embeddings()(answers).float(), dim=-1)  # [n, T, D]
        found = [(words.flatten(0, 1) @ F.normalize(group.float(), dim=-1).mT).amax(-1) for group in groups]
        best = torch.cat(found)[order].unflatten(1, words.shape[:2])  # [n images, n texts, T]
        similarities = (best * given).sum(-1) / given.sum(-1)  # [n, n]
        positives = (answers[:, None] == answers[None, :]).all(-1)  # equal answers are positives of one another
        tau = signals.extra()
        both = losses.contrastive(similarities, positives, tau) + losses.contrastive(similarities.T, positives, tau)
        return both.sum() / 2

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        first = signals.inputs.input_ids[:1, :1].to(signals.device)
        return (signals.extra() + signals.student.model.get_input_embeddings()(first).sum()) * 0.0


@register("terms", "tags")
@dataclass(frozen=True)
class Tags(Term):
    """Which words the answer has, told from the picture alone; each word looks for its best place in the picture.

    It teaches the vision encoder only.
    """

    origin: ClassVar[str] = "this project"
    status: ClassVar[str] = "our choice"
    needs: ClassVar[tuple[str, ...]] = ("student.features",)
    count: ClassVar[str] = "pictured"

    @property
    def learns_answers(self) -> bool:
        return True

    def extra(self, pair: Pair) -> nn.Module:
        head = nn.Linear(pair.student.feature_width, pair.student.vocabulary)
        nn.init.constant_(head.bias, -3.0)  # most words are absent
        return head

    def loss(self, signals: Signals) -> Tensor:
        inputs = signals.inputs
        pictured = [b for b, n in enumerate(inputs.images) if n]
        if not pictured:
            return signals.zero
        first = [sum(inputs.images[:b]) for b in pictured]
        groups, order = _grouped([signals["student.features"][i] for i in first])
        answers, given = _packed(inputs.targets[pictured])  # [n, T]
        present = torch.zeros(len(first), signals.extra.out_features, dtype=torch.bool)  # [n, V]
        present[torch.arange(len(first))[:, None].expand_as(answers)[given], answers[given]] = True
        words = torch.cat([signals.extra(group).amax(1) for group in groups])[order]  # [n, V]: each at its best place
        return losses.tags(words, present.to(words.device, non_blocking=True)).sum()

    def dummy(self, signals: Signals, features: Tensor) -> Tensor:
        return signals.extra(features).sum() * 0.0


class Temperature(nn.Module):
    """The contrastive temperature, learned, kept in [0.001, 0.5] (starts at 0.07 as in CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # FSDP2 takes no scalars

    def forward(self) -> Tensor:
        return (-self.log_scale).exp().clamp(0.001, 0.5).squeeze()


def alike(own: Sequence[Tensor], other: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images whose tensors have the same shapes on both sides, stacked. own, other: [N, D] by image; gives [n, N, D] each."""
    for places in _by_shape(own, other):
        yield torch.stack([own[i] for i in places]), torch.stack([other[i] for i in places])


def _grouped(images: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Images of the same shape, stacked [n, N, D], and the order that brings what is computed of all of them back to theirs."""
    places = _by_shape(images)
    order = torch.tensor([i for group in places for i in group]).argsort()
    return [torch.stack([images[i] for i in group]) for group in places], order


def _by_shape(*sides: Sequence[Tensor]) -> list[list[int]]:
    """The places of images whose tensors have the same shapes, `TOGETHER` at most in a group."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, tensors in enumerate(zip(*sides, strict=True)):
        groups.setdefault(tuple(tensor.shape for tensor in tensors), []).append(place)
    return [places[i : i + TOGETHER] for places in groups.values() for i in range(0, len(places), TOGETHER)]


def _packed(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Answer tokens moved to the front, 0 behind them, and which places hold one. [n, L] -> [n, T], [n, T] bool"""
    rows = [row[row >= 0] for row in targets]
    answers = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    given = nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return answers, given
