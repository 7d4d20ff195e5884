"""One pass of a vision encoder that teacher and student have in common."""

from __future__ import annotations

import logging

import torch

from mmkd.towers.tower import Tower, TowerInputs

logger = logging.getLogger(__name__)


def sees_alike(student: Tower, teacher: Tower, inputs: TowerInputs) -> bool:
    """Whether the student's encoder is frozen, has the teacher's weights, and its features, through the teacher's projector, are
    the visual tokens that the teacher sees in these pictures (families may reorder tokens around their projector)."""
    if any(p.requires_grad for p in encoder(student).values()) or not _equal_weights(student, teacher):
        return False
    with torch.no_grad():
        features = student.see(inputs).features
        own = teacher.see(inputs)
        if [f.shape for f in features] != [f.shape for f in own.features]:
            return False
        tokens = teacher.project(features)
    alike = len(tokens) == len(own.tokens) and all(map(_close, tokens, own.tokens))
    if alike:
        logger.info("teacher and student share a frozen vision encoder: it runs once for both")
    return alike


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def encoder(tower: Tower) -> dict[str, torch.nn.Parameter]:
    """Parameters of the vision encoder by name, without the projector's where that is inside it."""
    projector = set(map(id, tower.projector.parameters()))
    return {name: p for name, p in tower.vision.named_parameters() if id(p) not in projector}


def _equal_weights(student: Tower, teacher: Tower) -> bool:
    own, other = encoder(student), encoder(teacher)
    if own.keys() != other.keys():
        return False
    return all(own[n].dtype == other[n].dtype and torch.equal(own[n], other[n]) for n in own)
