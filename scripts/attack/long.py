#!/usr/bin/env python3
"""Does memory stay flat? A tiny run of many steps, and an evaluation of many questions, with their memory as they go.

    python scripts/attack/long.py                                       # 20,000 steps, 200,000 questions
    python scripts/attack/long.py --steps 2000 --questions 20000 --json long.json

Memory is that of the process and its children together (resident set size: the process begins as a fork, and by proportional
size the pages that it has in common with its parent would seem to grow as they part), once a second. What is printed: the median
over the fifth tenth of the time, when all data are read, over the last tenth, and the slope between them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kill  # puts the repository on the path

EVERY = 1.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare samples")
    parser.add_argument("--json", help="write the result here, too")
    options = parser.parse_args()
    kill.ready()
    with tempfile.TemporaryDirectory() as name:
        folder = kill.inputs(Path(name))
        found = {}
        for what, count, command in (
            ("steps", options.steps, train(folder, options.steps, options.workers)),
            ("questions", options.questions, ask(folder, options.questions)),
        ):
            if count:
                found[what] = {"count": count, **watched(command, folder / f"{what}.log")}
                print(line(what, found[what]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def train(folder: Path, steps: int, workers: int) -> list[str]:
    """Live teacher, two terms, a checkpoint now and then, no control."""
    import yaml

    recipe = yaml.safe_load((folder / "distill.yaml").read_text(encoding="utf-8"))
    stage = recipe["stages"]["first"] | {"steps": steps, "save_every": max(1, steps // 10), "log_every": max(1, steps // 200)}
    recipe |= {"control": False, "stages": {"only": stage}, "workers": workers}
    (folder / "long.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["distill", str(folder / "long.yaml"), f"output={folder / 'long'}"]


def ask(folder: Path, questions: int) -> list[str]:
    """The data's 24 pictures again and again, each time with another question."""
    import yaml

    rows = [json.loads(text) for text in (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "data" / "many.jsonl").open("w", encoding="utf-8") as file:
        for number in range(questions):
            row = rows[number % len(rows)]
            file.write(json.dumps({**row, "id": str(number), "question": f"{row['question']} {number}"}) + "\n")
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    (folder / "many.yaml").write_text(yaml.safe_dump(card | {"split": "many"}), encoding="utf-8")
    model, output = str(folder / "student"), str(folder / "answers")
    return ["evaluate", model, "--benchmarks", str(folder / "many.yaml"), "--output", output, "--batch-size", "64"]


def watched(command: list[str], log: Path) -> dict[str, Any]:
    """Runs a command; its memory in MiB."""
    began, child, taken = time.monotonic(), kill.Child(command, log), []
    while not child.wait(EVERY):
        taken.append((time.monotonic() - began, memory(child.pid)))
    if child.code:
        sys.exit(f"mmkd {' '.join(command)} ended with {child.code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    seconds = time.monotonic() - began
    early = [mib for at, mib in taken if 0.4 * seconds < at <= 0.5 * seconds]
    late = [mib for at, mib in taken if at > 0.9 * seconds]
    if not early or not late:
        sys.exit(f"mmkd {command[0]} took {seconds:.0f} seconds, too few to tell; ask for more steps or questions")
    return {
        "seconds": round(seconds), "early_mib": round(statistics.median(early), 1), "late_mib": round(statistics.median(late), 1),
        "most_mib": round(max(mib for _, mib in taken), 1),
    }  # fmt: skip


def memory(pid: int) -> float:
    """MiB of a process and its children; what has ended meanwhile counts nothing."""
    import psutil

    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass
    return total / 2**20


def line(what: str, found: dict[str, Any]) -> str:
    grown = found["late_mib"] - found["early_mib"]
    return (
        f"{found['count']:,} {what} in {found['seconds']:,} s: {found['early_mib']:,.0f} MiB early, {found['late_mib']:,.0f} late"
        f" ({grown:+.1f}, {1000 * grown / (0.5 * found['count']):+.3f} MiB per 1,000), {found['most_mib']:,.0f} at most"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
