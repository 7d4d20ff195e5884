"""Sparse students in a run: what the recipe asks for is checked before step 1, and the use of experts is reported.

While a stage trains, every row of log/ROLE.jsonl holds the share of places that each expert got since the row before:
{"experts": {"tokens": N, "layers": {"0": [share of expert 0, ...]}}}. A token takes top_k places in every sparse layer; the
shares of a layer add up to 1. OUTPUT/experts.json sums them up by stage, from the logs alone, so a resumed run tells the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mmkd.base.files import write_whole
from mmkd.base.jsonl import log_rows, read_object
from mmkd.base.run_folder import SKIPPED
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import Receipt, upcycle
from mmkd.train.spec import StageSpec

logger = logging.getLogger(__name__)

LOGGED = "experts"  # key of a log row
RECEIPT = "upcycle.json"  # in a stage's folder


def upcycled(stage: StageSpec, student: Tower, seed: int) -> tuple[Tower, Receipt | None]:
    """The student as the stage trains it: made sparse where the stage says so, with the receipt."""
    if stage.upcycle is None:
        return student, None
    return upcycle(student, **stage.upcycle.model_dump(), seed=seed)


def write_receipt(receipt: Receipt, folder: Path) -> None:
    """Logs the receipt of a stage's upcycling and keeps it in the stage's folder."""
    for line in receipt.lines():
        logger.info("%s", line)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECEIPT, json.dumps(receipt.as_dict(), indent=1) + "\n")


# ---- use of experts --------------------------------------------------------------------------------------------------


class ExpertUse:
    """Places that experts got since the last row of the log; kept on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self.places: dict[int, Tensor] = {}  # by layer, each [E]
        self.tokens = 0

    def add(self, routed: dict[int, Tensor], tokens: int) -> None:
        """The places of one micro-batch of `tokens` tokens."""
        if not routed:
            return
        self.tokens += tokens
        for layer, places in routed.items():
            self.places[layer] = self.places[layer] + places if layer in self.places else places

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
        """The row's entry, and a new beginning; None without experts. `reduce` adds a tensor up over processes."""
        if not self.places:
            return None
        layers = {str(layer): _shares(reduce(places).tolist()) for layer, places in self.places.items()}
        tokens = int(reduce(next(iter(self.places.values())).new_tensor(self.tokens)))
        self.places, self.tokens = {}, 0
        return {"tokens": tokens, "layers": layers}


def _shares(places: list[float]) -> list[float]:
    total = sum(places)
    return [round(n / total, 4) if total else 0.0 for n in places]


def summarise_experts(run: Path) -> dict[str, Any]:
    """Use of experts by role and stage, from the run's logs; writes OUTPUT/experts.json when there are any.

    {role: {stage: {"tokens", "mean": {layer: shares over the stage}, "last": {layer: shares of the last row}, "receipt"}}}
    """
    found: dict[str, Any] = {}
    for path in sorted(path for path in (run / "log").glob("*.jsonl") if not path.name.endswith(SKIPPED)):
        stages = _stages(path)
        for stage, rows in stages.items():
            found.setdefault(path.stem, {})[stage] = _summary(rows) | _receipt_of(run, path.stem, stage)
    if found:
        write_whole(run / "experts.json", json.dumps(found, indent=1) + "\n")
    return found


def _stages(log: Path) -> dict[str, list[dict[str, Any]]]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in log_rows(log):
        if isinstance(row.get(LOGGED), dict):
            stages.setdefault(row["stage"], []).append(row[LOGGED])
    return stages


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(row["tokens"] for row in rows)
    mean = {
        layer: _shares([sum(row["tokens"] * row["layers"][layer][e] for row in rows) for e in range(len(shares))])
        for layer, shares in rows[-1]["layers"].items()
    }
    return {"tokens": tokens, "mean": mean, "last": rows[-1]["layers"]}


def _receipt_of(run: Path, role: str, stage: str) -> dict[str, Any]:
    paths = list((run / "stages" / role).glob(f"*_{stage}/{RECEIPT}"))
    return {"receipt": read_object(paths[0])} if paths else {}


def experts_table(found: dict[str, Any]) -> str:
    """The use of experts for the terminal: shares of the last logged steps of the student's sparse stages."""
    lines = []
    for stage, entry in found.get("student", {}).items():
        even = 100 / len(next(iter(entry["last"].values())))
        lines.append(f"experts at the end of stage {stage}: percent of a layer's places that each gets (even: {even:.0f})")
        for layer, shares in entry["last"].items():
            lines.append(f"  layer {layer:<3}" + "".join(f"{100 * share:6.1f}" for share in shares))
    return "\n".join(lines)
