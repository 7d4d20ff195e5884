"""Suites: several benchmarks with one average, as papers print it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from mmkd.base.cards import load_card
from mmkd.base.files import write_whole
from mmkd.base.schema import Strict
from mmkd.errors import DataError
from mmkd.evaluation.benchmarks import Benchmark, ReferenceScore, load_benchmark


class SuitePart(Strict):
    """One benchmark of a suite and which of its numbers counts."""

    model_config = ConfigDict(frozen=True)

    benchmark: str
    value: str = Field("score", description="dotted path of the number in results.json")
    scale: float = Field(100.0, gt=0, description="times this it is on a scale of 0 to 100")


class Suite(Strict):
    """A suite's card."""

    model_config = ConfigDict(frozen=True)

    name: str
    title: str
    parts: tuple[SuitePart, ...] = Field(min_length=1)
    reference_scores: tuple[ReferenceScore, ...] = ()
    notes: str = ""

    def benchmarks(self) -> list[Benchmark]:
        return [load_benchmark(part.benchmark) for part in self.parts]


def load_suite(name: str) -> Suite:
    """A suite by the name of its card below `evaluation/suites`, or by the path of a YAML file. Raises DataError."""
    return load_card("evaluation/suites", name, Suite)


def server_scores(text: str, suite: Suite) -> dict[str, float]:
    """The scores in "vqav2=77.7,vizwiz=41.5", in percent, by benchmark. Raises DataError for anything else."""
    known = [part.benchmark for part in suite.parts]
    scores: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in known or not 0 <= value <= 100:
            raise DataError(f"server score {part!r} is not BENCHMARK=PERCENT with one of {', '.join(known)}")
        scores[name] = value
    return scores


def average(suite: Suite, results: Mapping[str, Mapping[str, Any]], server: Mapping[str, float]) -> dict[str, Any]:
    """The values of a suite's parts on a scale of 0 to 100, and their mean.

    `results` are the contents of results.json by benchmark, `server` the values that a test server gave, which win.
    Returns {"values": {benchmark: number or None}, "from_server", "missing", "average"}; the average is None while a
    value is missing.
    """
    values = {part.benchmark: server.get(part.benchmark, _value(part, results)) for part in suite.parts}
    missing = [name for name, value in values.items() if value is None]
    mean = None if missing else math.fsum(values.values()) / len(values)
    given = {"from_server": sorted(server), "missing": missing, "average": mean}
    return {"suite": suite.name, "title": suite.title, "values": values, **given}


def _value(part: SuitePart, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    found: Any = results.get(part.benchmark, {})
    for key in part.value.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found) * part.scale


def write_suite(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def suite_table(suite: Suite, content: Mapping[str, Any]) -> str:
    """A suite's values for the terminal."""
    lines = []
    for name, value in content["values"].items():
        origin = "  (from its server)" if name in content["from_server"] else ""
        lines.append(f"  {name:<20} " + ("  –  its answers are with a test server" if value is None else f"{value:5.1f}{origin}"))
    if content["average"] is None:
        missing = ", ".join(content["missing"])
        return "\n".join([*lines, f"  no average: give --server-scores for {missing}"])
    return "\n".join([*lines, f"  {'average':<20} {content['average']:5.1f}"])
