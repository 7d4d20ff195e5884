"""`mmkd check --families`: the tower contract for every image-text family of the installed transformers.

Each family is built tiny (`tiny_families.py`) and checked (`check_tower`) in a process of its own, within a time limit, so that
one that hangs or crashes is a line of the table and no more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mmkd.errors import TowerError, did_you_mean

SECONDS = 180.0  # of one family
LONGEST_REASON = 300  # characters

Results = dict[str, dict[str, Any]]


def check_families(
    names: Sequence[str] = (), *, seconds: float = SECONDS, workers: int | None = None, progress: bool = True
) -> Results:
    """Checks the families `names`, or all; returns `{family: {"ok": bool, "rows": bool, "reason": str, "project": bool}}`.

    ok: passes the contract of a full tower.  rows: that of a teacher of rows.
    reason: why a family does not pass; of one that passes, why it has no `project`, or "".  seconds: limit of each.
    workers: families at a time, as many as processor cores when None. Raises TowerError for a name that is no family.
    """
    from tqdm import tqdm

    from mmkd.testing.tiny_families import image_text_families

    known = image_text_families()
    for name in names:
        if name not in known:
            raise TowerError(f"{name!r} is no image-text family of the installed transformers; {did_you_mean(name, known)}")
    families = list(names) or known
    results: Results = {}
    with tqdm(total=len(families), disable=None if progress else True, unit="family") as bar:
        for family, result in _finished(families, seconds, workers or os.cpu_count() or 1):
            results[family] = result
            bar.set_postfix_str(f"{sum(r['ok'] for r in results.values())} pass, last {family}")
            bar.update()
    return {family: results[family] for family in families}


def families_table(results: Results) -> str:
    """What passes, what does not and why, as aligned lines with a count at the end."""
    width = max(map(len, results), default=0)
    lines = [f"{family:<{width}}  {_verdict(result)}" for family, result in results.items()]
    return "\n".join([*lines, summary(results)])


def summary(results: Results) -> str:
    """How many pass."""
    full, rows = (sum(result[key] for result in results.values()) for key in ("ok", "rows"))
    return f"{full} of {len(results)} families pass as towers, {rows} as teachers of rows"


def write_results(results: Results, path: Path) -> None:
    """The results as JSON, one line a family, sorted."""
    lines = [f"{json.dumps(family)}: {json.dumps(results[family])}" for family in sorted(results)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def markdown_table(results: Results) -> str:
    """The table of models/README.md."""
    rows = ["| family | tower | teacher of rows | `project` |", "|---|---|---|---|"]
    for family, result in sorted(results.items()):
        passes = "passes" if result["ok"] else "no: " + _cell(result["reason"])
        projects = ("yes" if result["project"] else "no: " + _cell(result["reason"])) if result["ok"] else ""
        rows.append(f"| `{family}` | {passes} | {'passes' if result['rows'] else 'no'} | {projects} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _verdict(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return ("teacher of rows: " if result["rows"] else "no: ") + result["reason"]
    return "passes" if result["project"] else "passes, without project: " + result["reason"]


# ---- processes -------------------------------------------------------------------------------------------------------


def _finished(families: Sequence[str], seconds: float, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results in the order in which they come."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # the imports, which take longer than most checks, are done once
        context.set_forkserver_preload(["mmkd.testing", "mmkd.testing.tiny_families"])
    waiting, running = list(reversed(families)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_check_one, args=(family, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (family, process, time.monotonic() + seconds)
        first = min(end for _, _, end in running.values())
        ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
        now = time.monotonic()
        for pipe in [pipe for pipe, (_, _, end) in running.items() if pipe in ready or end <= now]:
            family, process, _ = running.pop(pipe)
            yield family, _received(pipe, process) if pipe in ready else _killed(process, seconds)


def _received(pipe: Connection, process: Any) -> dict[str, Any]:
    try:
        result = pipe.recv()
    except EOFError:
        process.join()
        return _refused(f"its process ended with exit code {process.exitcode}")
    process.join()
    return result


def _killed(process: Any, seconds: float) -> dict[str, Any]:
    process.kill()
    process.join()
    return _refused(f"not done within {seconds:.0f} s")


def _refused(reason: str, rows: bool = False) -> dict[str, Any]:
    return {"ok": False, "rows": rows, "reason": " ".join(reason.split())[:LONGEST_REASON], "project": False}


def _check_one(family: str, pipe: Connection) -> None:
    """Runs in a process of its own and sends one result."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from mmkd.testing.contracts import NO_SWITCH, check_rows, check_tower
    from mmkd.testing.tiny_families import tiny_family, why_no_tower

    if reason := why_no_tower(family):
        pipe.send(_refused(reason))
        return
    rows = False
    try:
        tower = tiny_family(family)
        check_rows(tower)
        rows = True
        if not tower.has_visual_tokens:
            pipe.send(_refused(tower.lacks().partition(": ")[2], rows))
            return
        facts = check_tower(tower)
    except Exception as error:  # whatever a family's code raises is its reason; nowhere else is catching so broad right
        kind = "" if isinstance(error, TowerError) else f"{type(error).__name__}: "
        pipe.send(_refused(f"{kind}{error}", rows))
        return
    switch = facts.get("visual switch", "yes")
    reason = "" if switch == "yes" else " ".join(switch.removeprefix(NO_SWITCH).split())[:LONGEST_REASON]
    pipe.send({"ok": True, "rows": rows, "reason": reason, "project": switch == "yes"})
