"""CPRD: teach a dual-encoder the order in which a cross-encoder ranks its hard negatives (arXiv 2407.07479).

No code of the authors exists in public. The listwise form and the partial ranking are the paper's as quoted
by others; the temperature, the rule for "valid", the reductions and all options are our choice.
"""

import math

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, result_dtype

RANK_REDUCTIONS = ("sum", "mean_valid")
_ABSENT = -1e30  # a logit that never counts but, unlike -inf, leaves no NaN in gradients


def contrastive_partial_ranking(
    similarities: Tensor,
    teacher_scores: Tensor,
    candidates: Tensor,
    temperature: float | Tensor,
    threshold: float = 0.1,
    *,
    top_m: int | None = None,
    margin: float | None = None,
    ceiling: float | None = None,
    rank_reduction: str = "sum",
    detach_temperature: bool = False,
    easy: Tensor | None = None,
) -> Tensor:
    """One value a query (rows are queries; call it with the transpose for the other direction).

    similarities `[B, M]`: of each query to the whole pool (cosines). candidates `[B, K]`: columns of the K
    hard negatives, best student similarity first, as `hard_negatives` gives them; a negative number means
    "none". teacher_scores `[B, K]`: the cross-encoder's scores of these candidates. Returns `[B]`, with
    gradient into similarities and, unless detach_temperature, the temperature (a learnable one is shared with
    the contrastive loss).

    With z = similarity / temperature in the teacher's order (descending, ties in the student's order):
    `Σ_{j < J*} logsumexp_{m >= j} z_m - z_j`, J* the first invalid rank. Each valid candidate in turn is the
    positive against all that the teacher ranks below it. Valid: teacher score >= threshold; or the first
    `top_m`; `margin` also ends the list at the first rank whose score is less than margin above the next one.
    `ceiling` leaves out candidates that the teacher scores at or above it: they are probably unlabelled positives.
    `rank_reduction="mean_valid"` divides by the number of valid terms. `easy` `[B, M]` (bool): pool entries
    that stand in every denominator too (leave out positives and the mined). A query with no valid candidate,
    or fewer than two candidates, gives 0. Raises ValueError for shapes that do not fit or an unknown
    reduction.
    """
    _check(similarities, teacher_scores, candidates, rank_reduction)
    columns, scores, present = _teacher_order(teacher_scores, candidates, ceiling)  # [B, K] each
    if detach_temperature and isinstance(temperature, Tensor):
        temperature = temperature.detach()
    z = (exact(similarities.gather(-1, columns)) / temperature).masked_fill(~present, _ABSENT)  # [B, K]
    below = z.unsqueeze(1).expand(-1, z.shape[1], -1)  # [B, K, K] row j holds all z_m
    ahead = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool, device=z.device).tril(-1)  # m < j
    totals = below.masked_fill(ahead, -math.inf).logsumexp(-1)  # [B, K]
    if easy is not None:
        others = (exact(similarities) / temperature).masked_fill(~easy, _ABSENT)  # [B, M]
        totals = torch.logaddexp(totals, others.logsumexp(-1, keepdim=True))
    valid = _valid_prefix(scores, present, threshold, top_m, margin)  # [B, K]
    losses = (totals - z).masked_fill(~valid, 0.0).sum(-1)  # [B]
    if rank_reduction == "mean_valid":
        losses = losses / valid.sum(-1).clamp(min=1)
    return losses.to(result_dtype(similarities))


def valid_negatives(
    teacher_scores: Tensor,
    candidates: Tensor,
    threshold: float = 0.1,
    *,
    top_m: int | None = None,
    margin: float | None = None,
    ceiling: float | None = None,
) -> Tensor:
    """Number of valid candidates of each query `[B]`: worth logging (useful between 1 and about K/2) and,
    where only queries with one shall count, the mask for the mean."""
    _, scores, present = _teacher_order(teacher_scores, candidates, ceiling)
    return _valid_prefix(scores, present, threshold, top_m, margin).sum(-1)


def hard_negatives(similarities: Tensor, positives: Tensor, k: int) -> Tensor:
    """Columns of the k most similar pool entries that are no positives, best first; `[B, K]`, -1 where the
    pool ends.

    similarities `[B, M]`, positives `[B, M]` (bool: the pair itself and whatever else matches the query). No
    gradient.
    """
    scores = similarities.detach().masked_fill(positives, -math.inf)  # [B, M]
    values, columns = scores.topk(min(k, scores.shape[-1]), dim=-1)  # [B, K]
    return columns.masked_fill(values == -math.inf, -1)


def contrastive(similarities: Tensor, positives: Tensor, temperature: float | Tensor) -> Tensor:
    """InfoNCE of each query over the pool, several positives sharing the target evenly; returns `[B]`.

    similarities `[B, M]`, positives `[B, M]` (bool, at least one a row). The contrastive loss is half the
    mean of this over rows plus half of that over the transpose.
    """
    z = exact(similarities) / temperature  # [B, M]
    losses = z.logsumexp(-1) - z.masked_fill(~positives, 0.0).sum(-1) / positives.sum(-1).clamp(min=1)  # [B]
    return losses.to(result_dtype(similarities))


def _check(similarities: Tensor, teacher_scores: Tensor, candidates: Tensor, rank_reduction: str) -> None:
    if teacher_scores.shape != candidates.shape or candidates.shape[0] != similarities.shape[0]:
        raise ValueError(
            f"similarities {tuple(similarities.shape)}, teacher_scores {tuple(teacher_scores.shape)}, "
            f"candidates {tuple(candidates.shape)}; they must be [B, M], [B, K], [B, K]"
        )
    if rank_reduction not in RANK_REDUCTIONS:
        raise ValueError(
            f"rank_reduction is {rank_reduction!r}; it must be one of {', '.join(RANK_REDUCTIONS)}"
        )


def _teacher_order(
    teacher_scores: Tensor, candidates: Tensor, ceiling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and scores in the teacher's order, and which places hold a candidate at all. `[B, K]` each"""
    scores = teacher_scores.detach().to(result_dtype(teacher_scores))  # [B, K]
    present = candidates >= 0  # [B, K]
    if ceiling is not None:
        present = present & (scores < ceiling)
    scores = scores.masked_fill(~present, -math.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    columns = candidates.clamp(min=0).gather(-1, order)  # [B, K]
    return columns, scores, present.gather(-1, order)


def _valid_prefix(
    scores: Tensor, present: Tensor, threshold: float, top_m: int | None, margin: float | None
) -> Tensor:
    """Which ranks count `[B, K]`: a prefix, as scores are sorted."""
    if top_m is None:
        valid = present & (scores >= threshold)
    else:
        valid = present & (torch.arange(scores.shape[-1], device=scores.device) < top_m)
    if margin is not None:
        close = torch.nn.functional.pad(scores[:, :-1] - scores[:, 1:] < margin, (0, 1), value=False)
        valid = valid & (close.cumsum(-1) == 0)
    return valid & (present.sum(-1, keepdim=True) > 1)
