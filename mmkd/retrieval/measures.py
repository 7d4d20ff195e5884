"""Retrieval: ranks, recall and median rank, with intervals over pictures.

Pure functions on a similarity matrix. Pictures may have several captions and captions several pictures: a query is answered
at the rank of its best match.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mmkd.errors import DataError
from mmkd.evaluation.intervals import interval, paired_difference

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image", "both")


def best_ranks(similarities: Tensor, relevant: Tensor) -> Tensor:
    """Rank of each query's best match, counted from 1. similarities, relevant (bool) `[Q, N]` -> `[Q]`.

    A tie counts against the model: an entry that is not relevant and just as similar ranks before the match, so that a model
    which gives every entry the same similarity ranks last, not first. Raises DataError for shapes that differ, for a query
    without a match and for similarities that are not numbers.
    """
    if similarities.shape != relevant.shape or similarities.dim() != 2:
        raise DataError(
            f"similarities {list(similarities.shape)} and relevant {list(relevant.shape)} must be two matrices of one shape"
        )
    if similarities.isnan().any():
        raise DataError(f"{int(similarities.isnan().sum())} similarities are NaN; the model is broken")
    without = (~relevant.any(-1)).nonzero().flatten().tolist()
    if without:
        raise DataError(f"{len(without)} queries have no match in the pool (first: {without[:5]}); take them out")
    best = similarities.masked_fill(~relevant, -torch.inf).amax(-1, keepdim=True)  # [Q, 1]
    return 1 + (~relevant & (similarities >= best)).sum(-1)


def recall_at(ranks: Sequence[int] | Tensor, k: int) -> float:
    """Share of queries with a match among the first k."""
    hits = hits_at(ranks, k)
    return sum(hits) / len(hits)


def hits_at(ranks: Sequence[int] | Tensor, k: int) -> list[float]:
    """1.0 for each query with a match among the first k, else 0.0."""
    return [float(rank <= k) for rank in (ranks.tolist() if isinstance(ranks, Tensor) else ranks)]


def median_rank(ranks: Sequence[int] | Tensor) -> float:
    """The middle rank, of an even number the mean of the two in the middle."""
    return float(median(ranks.tolist() if isinstance(ranks, Tensor) else ranks))


def retrieval_ranks(image_to_text: Tensor, text_to_image: Tensor, relevant: Tensor) -> dict[str, list[int]]:
    """Ranks both ways, and those of all queries together.

    image_to_text `[I, T]`, text_to_image `[T, I]` (for a dual encoder the transpose), relevant `[I, T]` bool.
    """
    ranks = {
        "image_to_text": best_ranks(image_to_text, relevant).tolist(),
        "text_to_image": best_ranks(text_to_image, relevant.T).tolist(),
    }
    return ranks | {"both": ranks["image_to_text"] + ranks["text_to_image"]}


def query_groups(relevant: Tensor) -> dict[str, list[Hashable]]:
    """The picture that each query belongs to, by direction: what intervals take as one draw. relevant `[I, T]`.

    A caption of several pictures goes with the first of them.
    """
    pictures = list(range(relevant.shape[0]))
    of_texts = relevant.int().argmax(0).tolist()
    return {"image_to_text": pictures, "text_to_image": of_texts, "both": pictures + of_texts}


def compare_retrieval(ranks: Mapping[str, Mapping[str, Sequence[int]]], relevant: Tensor) -> dict[str, Any]:
    """Models on one test set: {role: ranks as from `retrieval_ranks`} -> recall with intervals and paired differences.

    Returns {"recall": {"recall@10_both": {"n", role, role_ci95, "student_minus_control": {"mean", "ci95"}, ...}},
    "median_rank": {direction: {role: rank}}}. Intervals are 95 % intervals over pictures with all queries that
    belong to them; differences are paired.
    """
    groups = query_groups(relevant)
    recalls = {}
    for direction in DIRECTIONS:
        for k in CUTOFFS:
            hits = {role: hits_at(found[direction], k) for role, found in ranks.items()}
            recalls[f"recall@{k}_{direction}"] = _compared(hits, groups[direction])
    medians = {d: {role: median_rank(found[d]) for role, found in ranks.items()} for d in DIRECTIONS}
    return {"recall": recalls, "median_rank": medians}


def _compared(hits: Mapping[str, list[float]], groups: list[Hashable]) -> dict[str, Any]:
    entry: dict[str, Any] = {"n": len(groups)}
    for role, values in hits.items():
        mean, low, high = interval(values, groups)
        entry |= {role: mean, f"{role}_ci95": [low, high]}
    for other in ("before", "control", "teacher"):
        if "student" in hits and other in hits:
            mean, low, high = paired_difference(hits["student"], hits[other], groups)
            entry[f"student_minus_{other}"] = {"mean": mean, "ci95": [low, high]}
    return entry
