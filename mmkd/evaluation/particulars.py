"""What some benchmarks report beside their headline: ScienceQA's parts, POPE's and MME's numbers, MMBench's circles, CHAIR."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.formats.mme import TASKS as MME_TASKS
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.evaluation.compare import group_of, interval
from mmkd.evaluation.scorers import chair, mme, pope, scienceqa

LENIENT = ("scienceqa", "letter_exact")  # parsers whose strict rule has a lenient one beside it


def particulars(benchmark: Benchmark, rows: Sequence[Mapping]) -> dict[str, Any]:
    """Further numbers of a benchmark's scored rows, by the name under which results.json has them."""
    found: dict[str, Any] = {}
    if benchmark.parser in LENIENT:
        mean, low, high = interval([row["score_lenient"] for row in rows], [group_of(row) for row in rows])
        found |= {"score_lenient": mean, "ci95_lenient": [low, high]}
    if benchmark.parser == "scienceqa":
        found["scienceqa"] = scienceqa(rows)
    if benchmark.metric == "pope":
        found["pope"] = pope_numbers(rows)
    if benchmark.metric == "chair":
        found["chair"] = chair([row["prediction"] for row in rows], [row["references"] for row in rows])
    if benchmark.metric == "mme":
        found["mme"] = mme_numbers(rows)
    if benchmark.format == "mmbench":
        found["mmbench"] = mmbench_numbers(rows)
    if benchmark.format == "mmmu":
        found["mmmu"] = mmmu_numbers(rows)
    return found


def _labels(rows: Sequence[Mapping]) -> list[str]:
    return [row["references"][0] for row in rows]


def pope_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """POPE over all rows and by sampling; `f1_mean`, the mean of the samplings' F1, is what LLaVA prints."""
    samplings: dict[str, list[Mapping]] = {}
    for row in rows:
        samplings.setdefault(row["categories"].get("sampling", "all"), []).append(row)
    by = {name: pope([row["prediction"] for row in part], _labels(part)) for name, part in samplings.items()}
    whole = pope([row["prediction"] for row in rows], _labels(rows))
    return whole | {"by_sampling": by, "f1_mean": math.fsum(part["f1"] for part in by.values()) / len(by)}


def mme_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MME by task, and the sums of perception (at most 2,000), cognition (800) and all.

    A picture whose other question was left out, by a limit or as unreadable, is left out too and counted in "unpaired".
    """
    pairs = Counter(_picture(row) for row in rows)
    whole = [row for row in rows if pairs[_picture(row)] == 2]
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for row, label in zip(whole, _labels(whole), strict=True):
        task = row["categories"].get("task", "all")
        tasks.setdefault(task, []).append((_picture(row), row["prediction"], label))
    numbers: dict[str, Any] = mme(tasks)
    for part, names in MME_TASKS.items():
        if any(name in tasks for name in names):
            numbers[part] = {"score": math.fsum(numbers[name]["score"] for name in names if name in tasks)}
    return numbers | {"unpaired": len(rows) - len(whole)}


def _picture(row: Mapping) -> str:
    return "|".join(row["images"])


def mmbench_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MMBench's circular score: a question is right when it is right in every order of its choices that was asked."""
    circles: dict[str, list[float]] = {}
    for row in rows:
        circles.setdefault(row["categories"]["circle"], []).append(row["score"])
    right = [min(scores) for scores in circles.values()]
    return {"circular": math.fsum(right) / len(right), "questions": len(circles), "rows": len(rows)}


def mmmu_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MMMU's score as it would be on average if unparsed letters were guessed, as the authors' code does."""
    guessed = [1 / len(row["choices"]) if row["parsed"] is None and row["choices"] else row["score"] for row in rows]
    return {"expected_with_guessing": math.fsum(guessed) / len(guessed)}
