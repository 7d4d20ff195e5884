"""How often the intervals of `mmkd.evaluation.intervals` hold the truth, in simulations of questions on pictures.

    python scripts/intervals.py [DRAWS]        # 2,000 draws of each case by default, a quarter of an hour on one core

A share of right answers can only take the values that its questions allow, so that the coverage of any rule swings with the true
mean. Each setting is therefore drawn over a grid of true means, and shown as the mean over the grid with its least and greatest.
Each picture has its own accuracy, drawn from a beta distribution whose intra-class correlation is `together`; the questions on it
are then drawn one by one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmkd.evaluation.intervals import interval, paired_difference

LEAST, MOST = 0.935, 0.965
FEW = 15  # questions that differ; below, a rule that is right about five such questions must say too little

Draw = Callable[[], tuple[tuple[list[float], ...], list[int]]]  # -> (scores of each model, picture of each question)


def drawn_scores(
    pictures: int, sizes: tuple[int, int], mean: float, together: float, kind: str, rng: np.random.Generator
) -> tuple[Draw, float]:
    """Draws of one model's scores, and their true mean.

    sizes: least and most questions on a picture.  kind: "right" (0 or 1), "thirds" (0, 1/3, 2/3, 1) or "anls" (0, 1/2..1, 1).
    """

    def draw() -> tuple[tuple[list[float], ...], list[int]]:
        groups = _groups(pictures, sizes, rng)
        return (_scores(_beta(mean, together, pictures, rng)[groups], kind, rng).tolist(),), groups.tolist()

    return draw, mean if kind != "anls" else 0.8 * mean + (1 - 0.8 * mean) * 0.375


def drawn_pairs(
    pictures: int, sizes: tuple[int, int], mean: float, together: float, kind: str, alike: float, behind: float,
    rng: np.random.Generator,
) -> tuple[Draw, float]:  # fmt: skip
    """Draws of two models' scores: the second gives the first's answer to a share `alike` of the questions, another share on each
    picture, and has `behind` times less accuracy on the others."""

    def draw() -> tuple[tuple[list[float], ...], list[int]]:
        groups = _groups(pictures, sizes, rng)
        own = _beta(mean, together, pictures, rng)[groups]
        first, other = _scores(own, kind, rng), _scores(own * (1 - behind), kind, rng)
        copied = rng.random(len(groups)) < _beta(alike, together, pictures, rng)[groups]
        return (first.tolist(), np.where(copied, first, other).tolist()), groups.tolist()

    return draw, (1 - alike) * mean * behind


def coverage(of: Callable[..., tuple[float, float, float]], drawn: tuple[Draw, float], draws: int) -> float:
    """Share of the draws whose interval holds the true mean."""
    draw, truth = drawn
    held = 0
    for _ in range(draws):
        scores, groups = draw()
        _, low, high = of(*scores, groups)
        held += low <= truth <= high
    return held / draws


def _groups(pictures: int, sizes: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return np.repeat(np.arange(pictures), rng.integers(sizes[0], sizes[1] + 1, pictures))


def _beta(mean: float, together: float, count: int, rng: np.random.Generator) -> np.ndarray:
    if together == 0:
        return np.full(count, mean)
    strength = (1 - together) / together
    return rng.beta(mean * strength, (1 - mean) * strength, count)


def _scores(accuracy: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "right":
        return (rng.random(len(accuracy)) < accuracy).astype(float)
    if kind == "thirds":
        return rng.binomial(3, accuracy) / 3
    near = np.where(rng.random(len(accuracy)) < 0.5, 0.0, rng.uniform(0.5, 1, len(accuracy)))
    return np.where(rng.random(len(accuracy)) < 0.8 * accuracy, 1.0, near)


def _show(name: str, shares: Sequence[float]) -> float:
    """One line: a setting, its mean over a grid and its least and greatest."""
    mean = sum(shares) / len(shares)
    print(f"{name:<78} {100 * mean:5.1f} %  ({100 * min(shares):.1f} to {100 * max(shares):.1f})", flush=True)
    return mean


def _sum_up(what: str, means: Sequence[float], points: Sequence[float]) -> None:
    for kind, shares in (("means over the grid", means), ("single points", points)):
        inside = sum(LEAST <= share <= MOST for share in shares)
        print(f"{what}, {kind}: {inside} of {len(shares)} between 93.5 and 96.5 %, {sum(s < LEAST for s in shares)} below, all "
              f"between {100 * min(shares):.1f} and {100 * max(shares):.1f} %")  # fmt: skip
    print()


def measure_scores(draws: int, rng: np.random.Generator) -> None:
    """Scores in all settings, each over a grid of true means."""
    grid = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
    means, points = [], []
    settings: Any = itertools.product(("right", "thirds", "anls"), (15, 30, 60), ((1, 1), (4, 4), (1, 6)), (0.0, 0.2, 0.4))
    for kind, pictures, sizes, together in settings:
        if sizes == (1, 1) and together:
            continue  # with one question a picture it changes nothing
        shares = [coverage(interval, drawn_scores(pictures, sizes, mean, together, kind, rng), draws) for mean in grid]
        means.append(_show(f"{kind}: {pictures} pictures, {sizes[0]}-{sizes[1]} questions, together {together}", shares))
        points += shares
    _sum_up("scores", means, points)


def measure_differences(draws: int, rng: np.random.Generator) -> None:
    """Differences of two models, each setting over a grid of true differences; apart where few questions differ."""
    found: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    grid = (0.0, 0.1, 0.2, 0.3, 0.5)
    settings: Any = itertools.product(("right", "thirds"), (15, 30, 60, 120), (0.5, 0.8, 0.9), (0.0, 0.3))
    for kind, pictures, alike, together in settings:
        drawn = [drawn_pairs(pictures, (1, 6), 0.7, together, kind, alike, behind, rng) for behind in grid]
        differing = sum(_differing(draw) for draw, _ in drawn) / len(drawn)
        shares = [coverage(paired_difference, each, draws) for each in drawn]
        name = f"{kind}: {pictures} pictures, alike {alike}, together {together}; {differing:.0f} questions differ"
        means, points = found[differing < FEW]
        means.append(_show(name, shares))
        points += shares
    _sum_up(f"differences, {FEW} questions or more that differ", *found[False])
    _sum_up(f"differences, fewer than {FEW}", *found[True])


def _differing(draw: Draw) -> float:
    """How many questions two models answer with different scores, the mean of a few draws."""
    pairs = [draw()[0] for _ in range(50)]
    return float(np.mean([np.sum(np.not_equal(first, second)) for first, second in pairs]))


def main(arguments: Sequence[str]) -> None:
    draws = int(arguments[0]) if arguments else 2000
    rng = np.random.default_rng(0)
    measure_scores(draws, rng)
    measure_differences(draws, rng)


if __name__ == "__main__":
    main(sys.argv[1:])
