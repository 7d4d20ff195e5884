"""Checks before step 1: what is cheaper to find out now than after a night of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.data.samples import DataError
from mmkd.distill.collate import Collator, PairDataset
from mmkd.distill.distiller import Distiller, head_of
from mmkd.distill.rows import RowTerm, row_losses
from mmkd.losses import CrossEntropy
from mmkd.towers.tower import Seen, Tower, TowerInputs

logger = logging.getLogger(__name__)


class GuardError(DataError):
    """A run would not teach what it is meant to; the message says why and how to go on all the same."""


def run_guards(distiller: Distiller, dataset: PairDataset, samples: int, pixels_matter: bool, teacher_is_better: bool) -> dict:
    """Runs the guards on some training samples; returns what was measured, raises GuardError when one fails."""
    batch = Collator(distiller.tower, distiller.teacher)(_some(dataset, samples))["batch"].to(distiller.tower.device)
    towers = {"student": (distiller.tower, batch.student)}
    if distiller.teacher is not None:
        towers["teacher"] = (distiller.teacher, batch.teacher)
    facts: dict[str, float] = {}
    for role, (tower, inputs) in towers.items():
        if not bool(inputs.response.any()):
            raise GuardError(f"no sample of {len(inputs.ids)} has an answer token that the {role} is to predict")
        facts[f"{role}_loss"] = answer_loss(tower, inputs)
        if pixels_matter and sum(inputs.images) > 1:
            facts[f"{role}_loss_permuted"] = answer_loss(tower, inputs, permute=True)
    if pixels_matter:
        _check_pixels(facts)
    if teacher_is_better and distiller.teacher is not None:
        _check_teacher(facts)
    _log(distiller, facts)
    return facts


def _some(dataset: PairDataset, samples: int) -> list:
    """Samples spread over the data set, those with pictures first choice."""
    pictured = [i for i, s in enumerate(dataset.samples) if s.images] or list(range(len(dataset.samples)))
    step = max(1, len(pictured) // samples)
    return [dataset[i] for i in pictured[::step][:samples]]


@torch.no_grad()
def answer_loss(tower: Tower, inputs: TowerInputs, *, permute: bool = False) -> float:
    """Mean cross-entropy of a tower on its own targets. With `permute` each sample sees another sample's picture."""
    was_training = tower.model.training
    tower.model.eval()
    seen = tower.see(inputs)
    tokens = seen.tokens[1:] + seen.tokens[:1] if permute else seen
    if permute and len({t.shape for t in seen.tokens}) > 1:  # pictures of other sizes do not fit each other's places
        tokens = _reversed_values(seen)
    hidden = tower.read(inputs, tokens)[inputs.response]  # [R, D]
    tower.model.train(was_training)
    term = RowTerm("cross_entropy", 1.0, CrossEntropy(), needs_teacher=False, rows=None)
    total, _ = row_losses(hidden, head_of(tower), inputs.targets[inputs.response], [term])
    return float(total) / len(hidden)


def _reversed_values(seen: Seen) -> list[Tensor]:
    return [tokens.flip(0) for tokens in seen.tokens]


def _check_pixels(facts: dict[str, float]) -> None:
    for role in ("student", "teacher"):
        plain, permuted = facts.get(f"{role}_loss"), facts.get(f"{role}_loss_permuted")
        if permuted is not None and plain == permuted:
            raise GuardError(
                f"permuting the pictures does not change the {role}'s loss ({plain:.6f}): its pixels never reach the language "
                "model. Check its processor and image token; to train all the same set guards.pixels_matter=false"
            )


def _check_teacher(facts: dict[str, float]) -> None:
    if facts["teacher_loss"] >= facts["student_loss"]:
        raise GuardError(
            f"the teacher's loss on the training answers ({facts['teacher_loss']:.3f}) is not below the untrained student's "
            f"({facts['student_loss']:.3f}): it was not loaded, does not know this task, or is asked in another template. Fine-tune "
            "it first; to train all the same set guards.teacher_is_better=false"
        )


def _log(distiller: Distiller, facts: dict[str, float]) -> None:
    for name, value in facts.items():
        logger.info("guard: %s %.4f", name, value)
    for part, parameters in distiller.tower.part_parameters().items():
        trained = sum(p.numel() for _, p in parameters if p.requires_grad)
        logger.info("trained: %-9s %12s of %12s parameters", part, f"{trained:,}", f"{sum(p.numel() for _, p in parameters):,}")


def empty_targets(samples: Sequence) -> list[str]:
    """Ids of samples without an answer."""
    return [s.id for s in samples if not s.answer.strip()]
