"""Where a report's files lie, and reading them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.evaluation.results import read_object, read_predictions, read_results
from mmkd.evaluation.roles import ordered


def roles_of(run: Path) -> list[str]:
    """The models of a run that were evaluated."""
    folder = run / "evaluation"
    return ordered(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

BLIND = "_blind"  # ending of the folders of answers without pictures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of one model's evaluations lie; `blind` holds answers without pictures, `log` a training's losses."""

    answers: Path
    blind: Path | None = None
    log: Path | None = None

    @staticmethod
    def of_run(run: Path, role: str) -> ModelFiles:
        return ModelFiles(run / "evaluation" / role, run / "evaluation_blind" / role, run / "log" / f"{role}.jsonl")

    def blind_results(self, benchmark: str) -> Path:
        """Of a run in a folder beside, of `mmkd evaluate` among the benchmarks."""
        return (self.blind / benchmark if self.blind else self.answers / (benchmark + BLIND)) / "results.json"


def read_facts(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none. Raises DataError for anything else."""
    return read_object(path) if path.exists() else {}


def read_evaluations(models: Mapping[str, ModelFiles]) -> dict[str, dict[str, dict]]:
    """{benchmark: {model: {"results", "rows", "path", "blind"}}}, benchmarks by name; those without scores are left out."""
    found: dict[str, dict[str, dict]] = {}
    for name, files in models.items():
        for path in sorted(files.answers.glob("*/results.json")):
            benchmark, predictions = path.parent.name, path.with_name("predictions.jsonl")
            if benchmark.endswith(BLIND):
                continue
            results = read_results(path)
            if results.get("score", 0) is None:
                log.warning("%s is not in the report: the answers are with a test server", path.parent)
                continue
            blind_path = files.blind_results(benchmark)
            blind = read_results(blind_path) if blind_path.exists() else {}
            entry = {"results": results, "rows": read_predictions(predictions), "path": predictions}
            entry["blind"] = blind.get("score")
            found.setdefault(benchmark, {})[name] = entry
    return dict(sorted(found.items()))
