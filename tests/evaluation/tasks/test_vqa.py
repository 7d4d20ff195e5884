"""Soft accuracies: values worked out by hand, the official quirks among them."""

from __future__ import annotations

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.tasks import vqa
from mmkd.evaluation.tasks.vqa import stvqa_accuracy, textvqa_accuracy, vqa_accuracy


def ten(*parts: tuple[str, int]) -> list[str]:
    """References from (text, how often), filled up to ten with answers nobody gives."""
    given = [text for text, count in parts for _ in range(count)]
    return given + [f"filler{i}" for i in range(10 - len(given))]


@pytest.mark.parametrize("metric", [vqa_accuracy, textvqa_accuracy])
@pytest.mark.parametrize(
    ("count", "expected"),
    # n matches of ten: n times min(1, (n-1)/3), else min(1, n/3)
    [(0, 0.0), (1, 9 / 30), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (9, 1.0)],
)
def test_soft_accuracy_leaves_each_reference_out(metric, count: int, expected: float) -> None:
    assert metric("Two dogs.", ten(("two dogs", count))) == pytest.approx(expected)


def test_vqav2_normalises_only_where_references_differ() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0  # white space goes first
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1.0


def test_soft_accuracy_refuses_too_few_references() -> None:
    with pytest.raises(DataError, match="exactly 10 references, got 1"):
        textvqa_accuracy("yes", ["yes"])
    with pytest.raises(DataError, match="got 3"):
        vqa_accuracy("yes", ["yes"] * 3)


def test_references_are_normalised_once() -> None:
    references = ten(("once", 5))
    textvqa_accuracy("once", references)
    before = vqa._evalai_references.cache_info()
    textvqa_accuracy("other", references)
    after = vqa._evalai_references.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_stvqa_accuracy() -> None:
    assert stvqa_accuracy("The Ace", ["king", "ace."]) == 1.0
    assert stvqa_accuracy("aces", ["ace"]) == 0.0
