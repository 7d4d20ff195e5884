"""Curves of a training's losses, from its log to paths of an SVG drawing."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.base.jsonl import log_rows
from mmkd.evaluation.roles import in_words

MAX_POINTS = 240  # of one curve
SMOOTHING = 0.05  # share of the points under the moving mean
SCORE = "score "  # beginning of the name of a score in training
NO_CURVE = {"step", "epoch", "stage", "learning_rate", "grad_norm"}
CHART_WIDTH, CHART_HEIGHT = 280, 186
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 38

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scale:
    """Maps values low..high to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _read_log(path: Path) -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, str]], int]:
    """Points (step, value) of every term, where each stage begins, and how many values were not finite.

    Where steps start again with a stage, the stages are put one after the other.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    stages: list[tuple[float, str]] = []
    offset = last = 0.0
    broken = 0
    for entry in log_rows(path):
        step, stage = float(entry["step"]), entry["stage"]
        if not stages or stages[-1][1] != stage:
            offset = last if stages and step + offset < last else offset
            stages.append((last if stages else step, stage))
        last = max(last, step + offset)
        for name, value in entry.items():
            if name in NO_CURVE or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if math.isfinite(value):
                terms.setdefault(name, []).append((step + offset, float(value)))
            else:
                broken += 1
    return terms, stages, broken


def risk_coverage(calibration: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A chart of what share each model has right among the questions that it is surest of, over how many these are.

    calibration: {model: what results.json says of its probabilities}.
    """
    series = {role: found["curve"] for role, found in calibration.items() if len(found["curve"]) > 1}
    low = min((value for points in series.values() for _, value in points), default=0.0)
    x, floor = _Scale(0.0, 1.0, LEFT, CHART_WIDTH - RIGHT), ticks(low, 1.0, 4)
    y = _Scale(floor[0], 1.0, CHART_HEIGHT - BOTTOM, TOP)
    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "box": {"left": LEFT, "right": CHART_WIDTH - RIGHT, "top": TOP, "bottom": CHART_HEIGHT - BOTTOM},
        "x_ticks": [(x(share), f"{100 * share:.0f} %") for share in (0.0, 0.5, 1.0)],
        "y_ticks": [(y(tick), f"{100 * tick:.0f} %") for tick in floor if tick <= 1],
        "curves": [{"role": role, "path": _path(points, x, y)} for role, points in series.items()],
    }


def charts(paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One chart a term, the whole loss first, with a curve for every model that was trained.

    Losses that are sums of other terms are not to be compared: they have a chart each.
    """
    logs = {name: _read_log(path) for name, path in sorted(paths.items(), key=lambda item: item[0] != "student")}
    names = dict.fromkeys(name for terms, _, _ in logs.values() for name in terms)
    order = sorted(names, key=lambda name: (name != "loss", list(names).index(name)))
    broken = {role: count for role, (_, _, count) in logs.items() if count}
    if broken:
        log.warning("values that are not finite are left out of the curves: %s", broken)
    charts = []
    for name in order:
        series = {role: terms[name] for role, (terms, _, _) in logs.items() if len(terms.get(name, [])) > 1}
        terms_of = {role: terms for role, (terms, _, _) in logs.items()}
        for alike in _of_same_terms(series, terms_of) if name == "loss" else [series]:
            if alike:
                stages = next(stages for role, (_, stages, _) in logs.items() if role in alike)
                named = name if len(alike) == len(series) else f"{name} of {', '.join(map(in_words, alike))}"
                charts.append(_chart(named, alike, stages))
    return charts


def _of_same_terms(series: Mapping[str, Any], terms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a whole loss, those of models with the same terms together."""
    groups: dict[frozenset[str], dict[str, Any]] = {}
    for role, points in series.items():
        own = frozenset(name for name in terms[role] if name != "loss" and not name.startswith(SCORE))
        groups.setdefault(own, {})[role] = points
    return list(groups.values())


def _chart(
    name: str, series: Mapping[str, list[tuple[float, float]]], stages: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    thinned = {role: _thin(points) for role, points in series.items()}
    smooth = {role: _smooth(points) for role, points in thinned.items()}
    steps = [x for points in thinned.values() for x, _ in points]
    values = [y for points in thinned.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(steps), max(steps), 4), ticks(min(values), max(values), 4)
    x = _Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, CHART_WIDTH - RIGHT)
    low, high = min(min(values), y_ticks[0]), max(max(values), y_ticks[-1])
    y = _Scale(low, high, CHART_HEIGHT - BOTTOM, TOP)
    ends = {role: points[-1][1] for role, points in smooth.items()}
    return {
        "name": name,
        "names": list(series),
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "box": {"left": LEFT, "right": CHART_WIDTH - RIGHT, "top": TOP, "bottom": CHART_HEIGHT - BOTTOM},
        "x_ticks": [(x(tick), f"{tick:g}") for tick in x_ticks if x.low <= tick <= x.high],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        "stages": [(x(start), stage) for start, stage in stages[1:]],
        "curves": [
            {"role": role, "raw": _path(thinned[role], x, y), "smooth": _path(smooth[role], x, y)}
            for role in series
        ],
        "summary": ", ".join(f"{role} ends at {value:.4g}" for role, value in ends.items()),
    }


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(math.fsum(x for x, _ in p) / len(p), math.fsum(y for _, y in p) / len(p)) for p in pieces]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving mean, narrower towards both ends so that it starts and stops where the curve does."""
    half = max(1, round(len(points) * SMOOTHING / 2))
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = [y for _, y in points[i - reach : i + reach + 1]]
        result.append((x, math.fsum(window) / len(window)))
    return result


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `wanted` of them."""
    span = high - low or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _path(points: Iterable[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return "M" + "L".join(f"{x(px):g},{y(py):g}" for px, py in points)
