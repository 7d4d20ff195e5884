"""How often the intervals of `mmkd.evaluation.intervals` hold the truth, in simulations of questions on pictures.

    python scripts/intervals.py [DRAWS]        # 2,000 draws of each case by default, some minutes on one core

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


def _show(rows: list[tuple[str, float]]) -> None:
    for name, share in rows:
        print(f"{name:<60} {100 * share:5.1f} %")
    inside = [0.935 <= share <= 0.965 for _, share in rows]
    print(f"{sum(inside)} of {len(rows)} cases between 93.5 and 96.5 %, all between "
          f"{100 * min(s for _, s in rows):.1f} and {100 * max(s for _, s in rows):.1f} %\n")  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    draws = int(arguments[0]) if arguments else 2000
    rng = np.random.default_rng(0)
    means, shares = (0.3, 0.5, 0.8, 0.9), (0.0, 0.2, 0.4)
    cases: Any = itertools.product(("right", "thirds", "anls"), (15, 30, 60), ((4, 4), (1, 6)), means, shares)
    rows = []
    for kind, pictures, sizes, mean, together in cases:
        name = f"score {kind}: {pictures} pictures, {sizes[0]}-{sizes[1]} questions, mean {mean}, together {together}"
        rows.append((name, coverage(interval, drawn_scores(pictures, sizes, mean, together, kind, rng), draws)))
    _show(rows)
    rows = []
    for kind, pictures, alike, behind, together in itertools.product(
        ("right", "thirds"), (15, 30, 60), (0.5, 0.9), (0.0, 0.3), (0.0, 0.3)
    ):
        name = f"difference {kind}: {pictures} pictures, alike {alike}, behind {behind}, together {together}"
        drawn = drawn_pairs(pictures, (1, 6), 0.7, together, kind, alike, behind, rng)
        rows.append((name, coverage(paired_difference, drawn, draws)))
    _show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
