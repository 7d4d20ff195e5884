"""Intervals hold the truth as often as they say, for few pictures and at the edges, too."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mmkd.errors import DataError
from mmkd.evaluation.intervals import interval, paired_difference, t_quantile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from intervals import coverage, drawn_pairs, drawn_scores


def test_the_quantile_is_that_of_students_t() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 7: 2.36462, 14: 2.14479, 29: 2.04523, 100: 1.98397, 1e6: 1.95997}
    for df, wanted in table.items():
        assert t_quantile(df) == pytest.approx(wanted, rel=2e-4), df
    assert t_quantile(3) > t_quantile(3.5) > t_quantile(4)


def test_right_and_wrong_of_many_questions_is_the_binomial_interval() -> None:
    mean, low, high = interval([1.0] * 300 + [0.0] * 100)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)


def test_one_question_a_picture_is_wilsons_interval_of_one_question_less() -> None:
    _, low, high = interval([1.0] * 27 + [0.0] * 3)
    n, z, p = 29, 1.95996, 0.9  # the mean gives the variance: no Student's t
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / 4 / n**2) / (1 + z * z / n)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-4)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_wrong_and_all_right_have_a_width(right) -> None:
    groups = np.repeat(np.arange(30), 4).tolist()
    mean, low, high = interval([right] * 120, groups)
    assert mean == right and low <= right <= high
    assert 0.08 < high - low < 0.15  # of 30 pictures, not of 120 questions
    assert interval([right] * 120, list(range(120)))[2] - interval([right] * 120, list(range(120)))[1] < 0.04
    assert interval([right])[2] - interval([right])[1] > 0.95  # one answer says next to nothing


def test_models_that_answer_alike_are_not_equal_for_certain() -> None:
    same = [1.0] * 60 + [0.0] * 60
    mean, low, high = paired_difference(same, same)
    assert mean == 0 and -low == pytest.approx(high) and 0.01 < high < 0.05
    few = paired_difference([1.0, 0.0], [1.0, 0.0])
    assert few[2] - few[1] > 1
    _, low, high = paired_difference([1.0] * 40, [0.0] * 40)
    assert 0.75 < low < 0.87 and high == 1.0


def test_the_interval_holds_the_mean_and_stays_in_range() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        scores = rng.choice([0.0, 1 / 3, 2 / 3, 1.0], count).tolist()
        groups = rng.integers(0, 4, count).tolist()
        mean, low, high = interval(scores, groups)
        assert 0 <= low <= mean <= high <= 1 and high > low
        other = rng.choice([0.0, 1.0], count).tolist()
        mean, low, high = paired_difference(scores, other, groups)
        assert -1 <= low <= mean <= high <= 1 and high > low


def test_other_scores_have_students_interval() -> None:
    scores = np.random.default_rng(0).normal(40, 10, 50)
    mean, low, high = interval(scores)
    half = 2.00958 * scores.std(ddof=1) / np.sqrt(50)
    assert (mean, low, high) == pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half), rel=1e-4)
    assert interval([3.0, 5.0], ["a", "a"])[1:] == (-np.inf, np.inf)


def test_clusters_widen_the_interval() -> None:
    # Every question is there four times: a quarter of the information that the count suggests.
    scores = np.repeat(np.random.default_rng(1).integers(0, 2, 100).astype(float), 4)
    groups = np.repeat(np.arange(100), 4)
    _, low, high = interval(scores)
    mean, wide_low, wide_high = interval(scores, groups.tolist())
    assert (wide_high - wide_low) / (high - low) == pytest.approx(2.0, abs=0.15)
    assert mean == scores.mean()


def test_unequal_clusters_keep_the_mean_over_questions() -> None:
    mean, low, high = interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert mean == 0.75
    assert low < 0.1 and high > 0.9


# Where 4,000 draws (`scripts/intervals.py`) give 93.5 to 96.5 %; here 1,000, whose own deviation is 0.7 %.
CASES = [
    (15, (4, 4), 0.5, 0.3, "right"), (15, (1, 6), 0.7, 0.2, "right"), (30, (1, 6), 0.3, 0.5, "right"),
    (15, (4, 4), 0.3, 0.2, "thirds"), (30, (1, 6), 0.6, 0.3, "thirds"), (60, (1, 6), 0.8, 0.3, "anls"),
    # Few pictures go wrong and these wholly: degrees of freedom by the number of pictures give 88 to 92 % here.
    (30, (1, 6), 0.95, 0.4, "thirds"), (30, (10, 10), 0.05, 0.3, "right"), (15, (4, 4), 0.9, 0.4, "thirds"),
]  # fmt: skip


@pytest.mark.parametrize(("pictures", "sizes", "mean", "together", "kind"), CASES)
def test_coverage_of_scores(pictures, sizes, mean, together, kind) -> None:
    draw = drawn_scores(pictures, sizes, mean, together, kind, np.random.default_rng(2))
    assert 0.92 <= coverage(interval, draw, 1000) <= 0.98


@pytest.mark.parametrize(("pictures", "alike"), [(15, 0.3), (60, 0.8)])
@pytest.mark.parametrize("kind", ["right", "thirds"])
def test_coverage_of_differences(pictures, alike, kind) -> None:
    draw = drawn_pairs(pictures, (1, 6), 0.6, 0.3, kind, alike, 0.2, np.random.default_rng(3))
    assert 0.92 <= coverage(paired_difference, draw, 1000) <= 0.98


def test_coverage_where_the_models_differ_on_few_pictures() -> None:
    draw = drawn_pairs(30, (1, 6), 0.7, 0.3, "thirds", 0.9, 0.3, np.random.default_rng(3))
    assert 0.925 <= coverage(paired_difference, draw, 1000) <= 0.98  # 91 % by the number of pictures


def test_outliers_leave_few_degrees_of_freedom() -> None:
    # Student's t of 39 degrees, and of 11.17 where the kurtosis is 8.11.
    for scores, quantile in (([4.0, 6.0] * 20, 2.02269), ([5.5] * 36 + [0.5] * 4, 2.1969)):
        _, low, high = interval(scores)
        assert (high - low) / 2 == pytest.approx(quantile * np.std(scores) / np.sqrt(39), rel=1e-3)


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(0, 2, 400).astype(float)
    b = np.where(rng.random(400) < 0.1, 1 - a, a)
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(a.mean() - b.mean())
    assert high - low < 0.8 * (interval(a)[2] - interval(a)[1])


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        ([], None, "needs a list"),
        ([1.0, float("nan")], None, "not finite"),
        ([1.0], ["a", "b"], "1 scores but 2 groups"),
    ],
)
def test_interval_refuses(scores: list, groups: list | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        interval(scores, groups)
