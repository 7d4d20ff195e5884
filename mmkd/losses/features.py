"""Match feature rows of the student to feature rows of the teacher (hints, as in FitNets, arXiv 1412.6550).

Not part of one of the four vision-language methods: for a student encoder that shall imitate the teacher's.
"""

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, result_dtype

DISTANCES = ("cosine", "mse", "smooth_l1")


def feature_match(student: Tensor, teacher: Tensor, distance: str = "cosine") -> Tensor:
    """Distance of each pair of rows; student, teacher `[..., D]`, returns `[...]`.

    "cosine": `1 - cos`; "mse": mean over D of the squared difference; "smooth_l1": mean over D of
    `d²/2` for |d| < 1, else `|d| - 1/2`. Different widths need a projection of the student first (the
    caller's). A row of zeros has cosine distance 1/2 to any other and 0 to itself. Raises ValueError for
    unequal shapes or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} differ; "
            "project the student's to the teacher's width and bring both to the same tokens"
        )
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}; it must be one of {', '.join(DISTANCES)}")
    dtype = result_dtype(student, teacher)
    student, teacher = exact(student), exact(teacher)  # [..., D] each
    if distance == "cosine":
        # |a/|a| - b/|b||² / 2 equals 1 - cos without the difference of nearly equal numbers.
        values = (_unit(student) - _unit(teacher)).square().sum(-1) / 2
    elif distance == "mse":
        values = (student - teacher).square().mean(-1)
    else:
        values = torch.nn.functional.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return values.to(dtype)


def _unit(x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
    return x / size.where(size > 0, torch.ones_like(size))


def tags(logits: Tensor, present: Tensor) -> Tensor:
    """Multi-label cross-entropy: which words does a picture's text contain? logits, present (bool) `[n, V]`; returns `[n]`.

    Sum over the vocabulary of the binary cross-entropies. Source of the idea: Joulin et al., arXiv 1511.02251 (visual features
    from the words of captions); the binary form is our choice.
    """
    wide = logits.to(result_dtype(logits))
    return torch.nn.functional.binary_cross_entropy_with_logits(wide, present.to(wide.dtype), reduction="none").sum(-1)
