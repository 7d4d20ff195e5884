"""Checks before step 1: what is cheaper to find out now than after a night of training."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from mmkd.engine.rows import RowTerm, row_losses
from mmkd.errors import GuardError, NotFiniteError
from mmkd.losses import CrossEntropy
from mmkd.teachers.teacher import head_of
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Seen, Tower, TowerInputs
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller

logger = logging.getLogger(__name__)


def run_guards(distiller: Distiller, dataset: PairDataset, samples: int, pixels_matter: bool, teacher_is_better: bool) -> dict:
    """Runs the guards on some training samples; returns what was measured, raises GuardError when one fails."""
    batch = dataset.collator(_some(dataset, samples))["batch"].to(distiller.tower.device)
    towers = {"student": (distiller.tower, batch.student)}
    facts: dict[str, float] = {}
    for name, part in batch.teachers.items():
        teacher = distiller.teachers[name]
        if not teacher.stored:
            towers[name] = (teacher.running(), part.inputs)
        elif (loss := teacher.answer_loss(part.inputs)) is not None:  # its pictures were checked when it was written
            facts[f"{name}_loss"] = loss
            _check_finite(name, facts)
    for role, (tower, inputs) in towers.items():
        if not bool(inputs.response.any()):
            raise GuardError(f"no sample of {len(inputs.ids)} has an answer token that the {role} is to predict")
        hidden = answer_rows(tower, inputs)
        facts[f"{role}_loss"] = answer_loss(tower, inputs, hidden)
        _check_finite(role, facts)
        if pixels_matter and _pictures_differ(inputs):
            permuted = answer_rows(tower, inputs, permute=True)
            facts[f"{role}_loss_permuted"] = answer_loss(tower, inputs, permuted)
            _check_pixels(role, hidden, permuted)
    if any(t.compares_features for t in distiller.terms):
        for role, (tower, inputs) in towers.items():
            _check_projection(role, tower, inputs)
    if teacher_is_better:
        for name in batch.teachers:
            _check_teacher(name, facts)
    _log(distiller, facts)
    return facts


def _check_finite(role: str, facts: dict[str, float]) -> None:
    """No comparison holds with NaN, so that it would pass the guards that compare."""
    wrong = [name for name, value in facts.items() if not math.isfinite(value)]
    if wrong:
        raise NotFiniteError(
            f"what the {role} computes from the training samples is not finite ({', '.join(wrong)}): its weights are damaged, or "
            "its numbers leave the range of its dtype; load it anew, or take another dtype (bfloat16 instead of float16)"
        )


def freeze_unreached(distiller: Distiller, dataset: PairDataset) -> list[str]:
    """Takes parameters that no term reaches out of training, and names them.

    A pooler that nobody reads, or encoder layers behind the feature layer, would otherwise only suffer weight decay, and
    data-parallel training would wait for their gradients without end.
    """
    batch = dataset.collator(_some(dataset, 2))["batch"].to(distiller.tower.device)
    distiller.train()
    loss, _ = distiller(batch)
    if not loss.requires_grad:
        raise GuardError(
            f"the terms reach no trained parameter: {', '.join(t.name for t in distiller.terms)}; "
            "train the part that they act on"
        )
    unreached = freeze_unreached_by(distiller, loss)
    if unreached:
        logger.info("not trained, since no term reaches them: %s", _brief(unreached))
    return unreached


def freeze_unreached_by(model: nn.Module, loss: Tensor) -> list[str]:
    """Takes the parameters that `loss` does not reach out of training and leaves no gradient; returns their names."""
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name in unreached:
            parameter.requires_grad_(False)
    return unreached


def _brief(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix("student.") for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _some(dataset: PairDataset, samples: int) -> list:
    """Samples spread over the data set, those with pictures first choice."""
    pictured = [i for i, s in enumerate(dataset.samples) if s.images] or list(range(len(dataset.samples)))
    step = max(1, len(pictured) // samples)
    return [dataset[i] for i in pictured[::step][:samples]]


@torch.no_grad()
def answer_rows(tower: Tower, inputs: TowerInputs, *, permute: bool = False) -> Tensor:
    """Hidden rows that predict the answers. With `permute` each picture stands in another's place. [R, D]"""
    with evaluating(tower.model):
        seen = tower.see(inputs)
        return tower.read(inputs, _permuted(seen) if permute else seen)[inputs.response]


def check_pixels(role: str, tower: Tower, inputs: TowerInputs) -> bool:
    """Raises GuardError when permuting the pictures of a batch changes nothing; False if it cannot tell, from one picture."""
    if not _pictures_differ(inputs):
        return False
    _check_pixels(role, answer_rows(tower, inputs), answer_rows(tower, inputs, permute=True))
    return True


def _pictures_differ(inputs: TowerInputs) -> bool:
    """Whether a batch holds two different pictures: many questions may be about one."""
    count = sum(inputs.images)
    if count < 2:
        return False
    return any(
        len(tensor) % count or any(not torch.equal(part, tensor[: len(part)]) for part in tensor.chunk(count))
        for tensor in inputs.pixels.values()
    )


def _permuted(seen: Seen) -> list[Tensor]:
    """Visual tokens moved on by one picture; where pictures differ in size, each is turned round in its own place."""
    if len({t.shape for t in seen.tokens}) > 1:
        return [tokens.flip(0) for tokens in seen.tokens]
    return seen.tokens[1:] + seen.tokens[:1]


@torch.no_grad()
def answer_loss(tower: Tower, inputs: TowerInputs, hidden: Tensor) -> float:
    """Mean cross-entropy of a tower on its own targets; hidden [R, D] as from `answer_rows`."""
    term = RowTerm("cross_entropy", 1.0, CrossEntropy(), needs_teacher=False, rows=None)
    total, _ = row_losses(hidden, head_of(tower), inputs.targets[inputs.response], [term])
    return float(total) / len(hidden)


def _check_pixels(role: str, hidden: Tensor, permuted: Tensor) -> None:
    # Hidden states, not losses: an untrained tower may see so faintly that its loss is the same to the last digit.
    if torch.equal(hidden, permuted):
        raise GuardError(
            f"permuting the pictures changes nothing that the {role} computes: its pixels never reach the language model. "
            "Check its processor and image token; to train all the same set guards.pixels_matter=false"
        )


@torch.no_grad()
def _check_projection(role: str, tower: Tower, inputs: TowerInputs) -> None:
    """Features that go through the projector must give the tower's own visual tokens, in their order."""
    seen = tower.see(inputs)
    projected = tower.project(seen.features)
    if len(projected) != len(seen.tokens):
        raise GuardError(
            f"the {role}'s family {tower.model.config.model_type!r} does not tell which vision features belong to which picture; "
            "take the visual switch and feature_match out, or use another pair"
        )
    for image, (whole, again) in enumerate(zip(seen.tokens, projected, strict=True)):
        own = whole[:, : again.shape[-1]]  # without what goes to the language model's first layers
        if own.shape != again.shape or not torch.allclose(own, again, rtol=1e-2, atol=1e-3 * float(own.abs().max())):
            raise GuardError(
                f"the {role}'s projector does not turn its vision features into its visual tokens (image {image}: "
                f"{list(own.shape)} against {list(again.shape)}): {tower.model.config.model_type!r} reorders or adds tokens "
                "around it, so the visual switch and feature_match would compare other places; take these terms out or use "
                "another pair"
            )


def _check_teacher(name: str, facts: dict[str, float]) -> None:
    loss = facts.get(f"{name}_loss")
    if loss is not None and loss >= facts["student_loss"]:
        raise GuardError(
            f"the {name}'s loss on the training answers ({loss:.3f}) is not below the untrained student's "
            f"({facts['student_loss']:.3f}): it was not loaded, does not know this task, or is asked in another template. "
            "Fine-tune it first; to train all the same set guards.teacher_is_better=false"
        )


def _log(distiller: Distiller, facts: dict[str, float]) -> None:
    for name, value in facts.items():
        logger.info("guard: %s %.4f", name, value)
    for part, parameters in distiller.tower.part_parameters().items():
        trained = sum(p.numel() for _, p in parameters if p.requires_grad)
        logger.info("trained: %-9s %12s of %12s parameters", part, f"{trained:,}", f"{sum(p.numel() for _, p in parameters):,}")
