"""One pass of a vision encoder that teacher and student have in common."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.towers.tower import Tower, TowerInputs

logger = logging.getLogger(__name__)


def sees_alike(student: Tower, teacher: Tower, inputs: TowerInputs) -> bool:
    """Whether the student's encoder is frozen, has the teacher's weights, and the features of one, through the other's projector,
    are the visual tokens that the other sees in these pictures (families may reorder tokens around their projector)."""
    if any(p.requires_grad for p in encoder(student).values()) or not _equal_weights(student, teacher):
        return False
    with torch.no_grad():
        own, other = student.see(inputs), teacher.see(inputs)
        if [f.shape for f in own.features] != [f.shape for f in other.features]:
            return False
        swapped = (student.project(other.features), teacher.project(own.features))
        alike = all(map(_all_close, swapped, (own.tokens, other.tokens)))
    if alike:
        logger.info("teacher and student share a frozen vision encoder: it runs once for both")
    return alike


def _all_close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    same = [x.shape for x in a] == [y.shape for y in b]
    return same and all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


def encoder(tower: Tower) -> dict[str, torch.nn.Parameter]:
    """Parameters of the vision encoder by name, without the projector's where that is inside it."""
    projector = set(map(id, tower.projector.parameters()))
    return {name: p for name, p in tower.vision.named_parameters() if id(p) not in projector}


def _equal_weights(student: Tower, teacher: Tower) -> bool:
    own, other = encoder(student), encoder(teacher)
    if own.keys() != other.keys():
        return False
    return all(own[n].dtype == other[n].dtype and torch.equal(own[n], other[n]) for n in own)
