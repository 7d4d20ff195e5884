"""Watches a stage for teacher hacking: proxy against golden loss on prompts that are held out (`monitor`, `until: golden`)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from mmkd.base.distributed import wait_for_all
from mmkd.base.files import write_whole
from mmkd.base.jsonl import JsonLines
from mmkd.runs.plateau import BEST, Measuring, write_whole_model
from mmkd.runs.watch import unchanged_randomness
from mmkd.train.monitor import Monitor

logger = logging.getLogger(__name__)

CURVES = "monitor.jsonl"  # of a stage's folder: {"step", "proxy", "golden"} a line
FACTS = "monitor.json"  # what `facts_of` gives
MARGIN = 0.01  # share by which a curve must differ from its value at the golden minimum
IN_A_ROW = 2  # measurements that must say so

Curves = dict[int, tuple[float, float]]  # by step: proxy, golden


class Hacking(Measuring):
    """Before the first step, every `monitor.every` steps and after the last: proxy and golden loss, into the role's log.

    Says in words when the student learns its teacher's faults. With `patience` the stage ends after so many golden losses in a
    row that are not below the lowest before, and the weights of the lowest, of equal ones the first, are kept for `best_weights`.
    What was measured up to the checkpoint from which a run goes on is read from the stage's folder.
    """

    def __init__(
        self, monitor: Monitor, role: str, stage: str, run: Path, folder: Path, done: int, patience: int | None = None,
        tell: Callable[[dict[str, float]], None] | None = None,
    ) -> None:  # fmt: skip
        """done: steps of the checkpoint from which the stage goes on.  tell: takes the losses for dashboards."""
        self.monitor, self.every, self.patience = monitor, monitor.spec.every, patience
        self.role, self.stage, self.folder = role, stage, folder
        self.log, self.tell = run / "log" / f"{role}.jsonl", tell or (lambda losses: None)
        rows = JsonLines(folder / CURVES).rows() if (folder / CURVES).exists() else []
        self.curves: Curves = {row["step"]: (row["proxy"], row["golden"]) for row in rows if row["step"] <= done}
        self._warned = hacked(self.curves) is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.curves and state.is_world_process_zero:
            with unchanged_randomness():
                self.measured(state.global_step)
        wait_for_all()

    def measured(self, step: int) -> bool:
        found = self.monitor.measure()
        lowest = min((golden for _, golden in self.curves.values()), default=math.inf)
        self.curves[step] = (found["proxy"], found["golden"])
        if self.patience is not None and (found["golden"] < lowest or len(self.curves) == 1):
            write_whole_model(self.monitor.student, self.folder / BEST)
        lines = [json.dumps({"step": s, "proxy": proxy, "golden": golden}) for s, (proxy, golden) in self.curves.items()]
        write_whole(self.folder / CURVES, "\n".join(lines) + "\n")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(self.log).append([{"stage": self.stage, "step": step} | {f"held-out {n}": value for n, value in found.items()}])
        self.tell({f"eval_{name}": value for name, value in found.items()})
        facts = facts_of(self.curves, self.patience)
        write_whole(self.folder / FACTS, json.dumps(facts) + "\n")
        where = f"{self.role}, stage {self.stage}, step {step}"
        logger.info(
            "%s: on held-out prompts proxy %.4g, golden %.4g (lowest %.4g at step %d)%s", where, found["proxy"], found["golden"],
            facts["lowest"]["golden"], facts["lowest"]["step"], "; no lower since, the stage ends" if facts["reached"] else "",
        )  # fmt: skip
        if facts["hacked"] is not None and not self._warned:
            self._warned = True
            logger.warning("%s: %s", where, in_words(facts))
        return facts["reached"]


def lowest_step(curves: Curves) -> int:
    """The step of the lowest golden loss, of equal ones the first; what is no number counts as infinite."""
    return min(sorted(curves), key=lambda step: curves[step][1] if math.isfinite(curves[step][1]) else math.inf)


def hacked(curves: Curves) -> int | None:
    """The first step at which, for the second time in a row, the student was closer to its teacher than at the golden minimum so
    far while its golden loss was above that, both by more than `MARGIN`; None where there is none."""
    so_far: Curves = {}
    row = 0
    for step in sorted(curves):
        so_far[step] = curves[step]
        proxy, golden = so_far[lowest_step(so_far)]
        row = row + 1 if curves[step][1] > golden * (1 + MARGIN) and curves[step][0] < proxy * (1 - MARGIN) else 0
        if row == IN_A_ROW:
            return step
    return None


def facts_of(curves: Curves, patience: int | None) -> dict[str, Any]:
    """{"steps", "first", "lowest", "last", "hacked", "reached", "kept"}; of a measurement {"step", "proxy", "golden"}.

    hacked: as above.  reached: whether the stage ended since golden did not fall.  kept: the step whose weights are the stage's;
    None without `until: golden`.
    """
    best, last = lowest_step(curves), max(curves)
    over = patience is not None and sum(step > best for step in curves) >= patience
    at = {"first": min(curves), "lowest": best, "last": last}
    told = {name: {"step": step, "proxy": curves[step][0], "golden": curves[step][1]} for name, step in at.items()}
    return {"steps": last, **told, "hacked": hacked(curves), "reached": over, "kept": None if patience is None else best}


def in_words(facts: Mapping[str, Any]) -> str:
    """What was found on held-out prompts, in one sentence."""
    low, last = facts["lowest"], facts["last"]
    curves = (
        f"proxy {low['proxy']:.4g} at step {low['step']}, {last['proxy']:.4g} at step {last['step']}; "
        f"golden {low['golden']:.4g}, {last['golden']:.4g}"
    )
    if facts["hacked"] is None:
        return f"no teacher hacking seen ({curves})"
    return (
        f"the student comes closer to its teacher while it gets worse at what the stage does not see ({curves}): it learns its "
        "teacher's faults (teacher hacking). More prompts or answers of the student help, and `until: golden` ends there"
    )


def monitor_facts(run: Path, role: str) -> dict[str, Any]:
    """By stage what `facts_of` gives; {} where nothing was watched."""
    found = sorted((run / "stages" / role).glob(f"*/{FACTS}"))
    return {path.parent.name.partition("_")[2]: json.loads(path.read_text(encoding="utf-8")) for path in found}


def monitor_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for the terminal."""
    lines = []
    for stage, facts in found.items():
        end = "" if facts["kept"] is None else f"; {'ended there, and ' if facts['reached'] else ''}step {facts['kept']} kept"
        lines.append(f"held-out prompts of stage {stage}: {in_words(facts)}{end}")
    return lines
