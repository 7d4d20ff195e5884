"""Retrieval measures against plain loops, their conventions, and their errors."""

from __future__ import annotations

import pytest
import torch

from mmkd.errors import DataError
from mmkd.retrieval.measures import (
    best_ranks,
    compare_retrieval,
    hits_at,
    median_rank,
    query_groups,
    recall_at,
    retrieval_ranks,
)


def random_case(images: int = 40, texts: int = 90, seed: int = 0):
    """Similarities and matches, each caption with one picture, pictures with none to several captions but at least one."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    relevant = torch.nn.functional.one_hot(owner, images).bool().T  # [I, T]
    similarities = torch.rand(images, texts, generator=generator) + 0.3 * relevant
    return similarities, relevant


def loop_rank(similarities: list[float], relevant: list[bool]) -> int:
    """Position of the first match in the sorted list."""
    order = sorted(range(len(similarities)), key=lambda i: -similarities[i])
    return 1 + next(place for place, i in enumerate(order) if relevant[i])


def test_ranks_are_those_of_a_sorted_list():
    similarities, relevant = random_case()
    expected = [loop_rank(s, r) for s, r in zip(similarities.tolist(), relevant.tolist(), strict=True)]
    assert best_ranks(similarities, relevant).tolist() == expected
    assert len(set(expected)) > 3


def test_several_captions_count_by_the_best_one():
    similarities = torch.tensor([[0.9, 0.1, 0.8, 0.2]])
    relevant = torch.tensor([[False, True, True, False]])
    assert best_ranks(similarities, relevant).tolist() == [2]


def test_a_tie_counts_against_the_model():
    relevant = torch.eye(5, dtype=torch.bool)
    assert best_ranks(torch.zeros(5, 5), relevant).tolist() == [5] * 5
    similarities = torch.tensor([[0.5, 0.5, 0.1]])
    assert best_ranks(similarities, torch.tensor([[True, False, False]])).tolist() == [2]
    assert best_ranks(similarities, torch.tensor([[True, True, False]])).tolist() == [1], "two matches do not tie with each other"


def test_recall_and_median():
    ranks = [1, 2, 6, 11]
    assert [recall_at(ranks, k) for k in (1, 5, 10, 11)] == [0.25, 0.5, 0.75, 1.0]
    assert hits_at(torch.tensor(ranks), 5) == [1.0, 1.0, 0.0, 0.0]
    assert median_rank(ranks) == 4 and median_rank([3, 1, 9]) == 3


def test_both_directions():
    similarities, relevant = random_case(seed=1)
    ranks = retrieval_ranks(similarities, similarities.T, relevant)
    assert ranks["text_to_image"] == best_ranks(similarities.T, relevant.T).tolist()
    assert ranks["both"] == ranks["image_to_text"] + ranks["text_to_image"]
    groups = query_groups(relevant)
    assert groups["image_to_text"] == list(range(40)) and len(groups["both"]) == 130
    assert all(relevant[group, text] for text, group in enumerate(groups["text_to_image"]))


def test_comparison_is_paired_and_by_picture():
    similarities, relevant = random_case(seed=2)
    better = similarities + 0.4 * relevant
    matrices = {"control": similarities, "student": better}
    ranks = {role: retrieval_ranks(s, s.T, relevant) for role, s in matrices.items()}
    found = compare_retrieval(ranks, relevant)
    entry = found["recall"]["recall@1_both"]
    lead = entry["student_minus_control"]
    assert lead["mean"] == pytest.approx(entry["student"] - entry["control"]) and lead["mean"] > 0
    assert lead["ci95"][0] <= lead["mean"] <= lead["ci95"][1]
    assert entry["n"] == 130 and len(found["recall"]) == 9
    assert found["median_rank"]["both"]["student"] <= found["median_rank"]["both"]["control"]
    same = compare_retrieval({"control": ranks["control"], "student": ranks["control"]}, relevant)
    alike = same["recall"]["recall@5_both"]["student_minus_control"]
    assert alike["mean"] == 0 and -0.05 < alike["ci95"][0] < 0 < alike["ci95"][1] < 0.05  # not known to be equal for certain


@pytest.mark.parametrize(
    ("similarities", "relevant", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), r"\[2, 3\] and relevant \[3, 2\]"),
        (torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), r"1 queries have no match .*\[1\]"),
        (torch.full((1, 1), torch.nan), torch.ones(1, 1, dtype=torch.bool), "1 similarities are NaN"),
    ],
)
def test_errors(similarities, relevant, words):
    with pytest.raises(DataError, match=words):
        best_ranks(similarities, relevant)
