"""95 % intervals of scores and of paired differences, for few pictures and at the edges, too.

Questions on one picture are right or wrong together, so pictures are what is drawn. Scores in 0..1 get Wilson's score interval
with an effective number of questions, and so do paired differences, which lie in -1..1. The variance is that between pictures,
the quantile Student's t. `scripts/intervals.py` simulates how often such intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

from mmkd.errors import DataError

LEVEL = 0.95
_ROUNDING = 1e-12  # of a variance; below it is none

_NORMAL = 1e6  # degrees of freedom from which Student's t is the normal distribution

Interval = tuple[float, float, float]


def interval(scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """Mean of the scores with its 95 % interval: (mean, low, high).

    groups: the picture of each question (a question without a picture is its own). With few pictures, with all scores 0 or all 1,
    the interval is wide, never of width zero.

    Scores in 0..1, right and wrong or fractions: Wilson's score interval (1927) with the effective number of questions
    n* = p(1 - p) / v, as for proportions in surveys of clusters (Dean and Pagano 2015, "Evaluating confidence interval methods
    for binomial proportions in clustered surveys"; Franco, Little, Louis and Slud 2019). v is the variance of the mean between
    pictures, each squared deviation divided by one minus the picture's share of the questions (Bell and McCaffrey 2002, CR2).
    The quantile is Student's t. Its degrees of freedom say how well v is known: 2C / (k - (C - 3) / (C - 1)) of C pictures whose
    deviations have kurtosis k (O'Neill 2014, "Some useful moment results in sampling problems"), at most the effective number
    of pictures, (sum m)^2 / sum m^2, less one. A few pictures that go quite wrong among many that go well leave few degrees.
    With one question a picture, right or wrong, the mean gives v, and the quantile is the normal distribution's.
    Where v says nothing (all scores 0, all 1, or one picture) n* is the effective number of pictures. Other scores: the mean
    with v and t; one group says nothing of its spread and gives an infinite interval.

    The interval says how the score would vary with other pictures of the same kind, not with another training seed. Raises
    DataError when there is nothing to score, on a score that is not finite, on groups of another length.
    """
    values = _checked(scores)
    sums = _sums_by_group(values, groups)  # [C, 2]
    mean = float(values.mean())
    variance, pictures = _variance(sums), _effective(sums[:, 1])
    if values.min() < 0 or values.max() > 1:
        return _t_interval(mean, variance, _freedom(sums))
    given = len(sums) == len(values) and set(values.tolist()) == {0.0, 1.0}  # then the mean gives the variance
    low, high = _wilson(mean, variance, len(values), pictures, _NORMAL if given else _freedom(sums))
    return mean, low, high


def paired_difference(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """Mean of a - b over the same questions, with its 95 % interval; much narrower than two intervals side by side.

    Scores in 0..1: the interval of `interval` for (1 + a - b) / 2, whose variance between pictures is raised by d^2 / (4 n^2),
    d^2 the mean square of the differences that are not 0 (1 where all are). That is the variance of half a question more that
    only a has right and half a one more that only b has right, as Agresti and Min (2005, "Simple improved confidence intervals
    for comparing matched proportions") add half a question to each cell: two models that answer all alike are not equal for
    certain. Where fewer than about 15 questions differ it holds the truth more often than it says, since so few can show little.
    Other values: the mean with the variance between pictures. Raises DataError when the two are not equally long.
    """
    if len(a) != len(b):
        raise DataError(f"a paired difference needs the same questions: {len(a)} scores against {len(b)}")
    first, second = _checked(a), _checked(b)
    values = first - second
    sums = _sums_by_group(values, groups)
    mean, pictures = float(values.mean()), _effective(sums[:, 1])
    if min(first.min(), second.min()) < 0 or max(first.max(), second.max()) > 1:
        return _t_interval(mean, _variance(sums), _freedom(sums))
    differing = values[values != 0]
    floor = float((differing**2).mean() if len(differing) else 1.0) / len(values) ** 2
    low, high = _wilson((1 + mean) / 2, (_variance(sums) + floor) / 4, len(values), pictures, _freedom(sums))
    return mean, 2 * low - 1, 2 * high - 1


def mean_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """Mean of values of any size, such as negative log-likelihoods, with its 95 % interval: the variance between pictures and
    Student's t. Raises DataError as `interval` does."""
    checked = _checked(values)
    sums = _sums_by_group(checked, groups)
    return _t_interval(float(checked.mean()), _variance(sums), _effective(sums[:, 1]))


@lru_cache(maxsize=16384)
def t_quantile(df: float) -> float:
    """The 97.5 % quantile of Student's t with `df` degrees of freedom, at least 1, whole or not; exact to 1e-4 of it.

    With x = sqrt(df) tan(angle) its density is that of the angle, cos(angle)^(df - 1), which is integrated.
    """
    last = math.pi / 2 if df < 30 else math.atan(60 / math.sqrt(df))  # behind it is nothing
    angles = np.linspace(0, last, 5_001)
    with np.errstate(divide="ignore"):
        density = np.cos(angles).clip(0) ** (df - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(df) * math.tan(np.interp(LEVEL, mass / mass[-1], angles)))


def _checked(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise DataError(f"an interval needs a list of scores, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite numbers")
    return values


def _sums_by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Sum and number of the values of every group. [C, 2]"""
    if groups is None:
        return np.stack([values, np.ones_like(values)], axis=1)
    if len(groups) != len(values):
        raise DataError(f"{len(values)} scores but {len(groups)} groups; give one group a score")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    return np.stack([np.bincount(index, weights=values), np.bincount(index)], axis=1)


def _variance(sums: np.ndarray) -> float:
    """Variance of the mean over all questions, from what groups differ by (CR2); infinite for one group. sums [C, 2]"""
    if len(sums) < 2:
        return math.inf
    total = sums[:, 1].sum()
    return float((_deviations(sums) ** 2 / (1 - sums[:, 1] / total)).sum() / total**2)


def _deviations(sums: np.ndarray) -> np.ndarray:
    """Of each group's sum from what the mean over all questions gives it. sums [C, 2] -> [C]"""
    return sums[:, 0] - sums[:, 1] * (sums[:, 0].sum() / sums[:, 1].sum())


def _freedom(sums: np.ndarray) -> float:
    """Degrees of freedom of `_variance` by the kurtosis of the deviations, at least 1, to two places. sums [C, 2]"""
    squares, count = _deviations(sums) ** 2, len(sums)
    most = max(1.0, _effective(sums[:, 1]) - 1)
    if count < 3 or squares.sum() <= _ROUNDING:
        return most
    kurtosis = count * (squares**2).sum() / squares.sum() ** 2
    return round(float(min(most, max(1.0, 2 * count / (kurtosis - (count - 3) / (count - 1))))), 2)


def _effective(sizes: np.ndarray) -> float:
    """How many groups of equal size say as much as these. sizes [C]"""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _t_interval(mean: float, variance: float, freedom: float) -> Interval:
    half = t_quantile(freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


def _wilson(share: float, variance: float, count: int, pictures: float, freedom: float) -> tuple[float, float]:
    """Bounds of a mean in 0..1 of `count` questions that varies so much between so many effective pictures."""
    known = 0 < share < 1 and _ROUNDING * share * (1 - share) / count < variance < math.inf
    questions = share * (1 - share) / variance if known else pictures
    square = t_quantile(max(1.0, freedom)) ** 2
    middle = (share + square / (2 * questions)) / (1 + square / questions)
    spread = square * (share * (1 - share) / questions + square / (4 * questions**2))
    half = math.sqrt(spread) / (1 + square / questions)
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))  # rounding leaves the mean within
