"""The same recipe over several seeds, and what is left of a lead when the luck of one seed is taken out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkd.base.files import write_whole
from mmkd.evaluation.roles import in_words, ordered
from mmkd.runs.run import distill

# 97.5 % quantiles of Student's t by degrees of freedom; beyond the table the normal one is close enough.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


# What a student leads by, as summaries have it, and in words.
LEADS = {
    "student_minus_control": "lead over the control",
    "student_minus_best_control": "lead over the best control",
    "student_minus_hard_answers": "lead over hard answers",
}


NLL = "_nll"  # ending of the key of a lead's difference in negative log-likelihood


def distill_seeds(recipe: Any, seeds: list[int], run: Callable[[Any], dict[str, Any]] = distill) -> dict[str, Any]:
    """Runs the recipe once a seed, under OUTPUT/seed_N, and writes OUTPUT/seeds.json. `run` makes a recipe its summary.

    Every benchmark gets the mean over seeds of each model's score and of the paired leads of the student, with the
    95 % interval of Student's t over seeds (the spread of training, not of questions).
    """
    folder = Path(recipe.output)
    summaries = {}
    for seed in seeds:
        one = recipe.model_copy(update={"seed": seed, "output": str(folder / f"seed_{seed}")})
        summaries[seed] = run(one)
    result = over_seeds(summaries)
    write_whole(folder / "seeds.json", json.dumps(result, indent=1) + "\n")
    return result


def over_seeds(summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """{benchmark: {role: {mean, values}, lead: {mean, ci95, values}}}, and mean leads over all benchmarks (see `LEADS`).

    A lead's key with `NLL` behind it is the paired difference of negative log-likelihoods, below 0 where the student is better.
    """
    names = list(next(iter(summaries.values()))["benchmarks"])
    result: dict[str, Any] = {"seeds": list(summaries), "benchmarks": {}}
    leads: dict[str, list[list[float]]] = {}
    for name in names:
        entries = [summary["benchmarks"][name] for summary in summaries.values()]
        found: dict[str, Any] = {"n": entries[0]["n"]}
        for role in _roles(entries[0]):
            found[role] = spread([e[role] for e in entries])
        for lead in LEADS:
            if all(lead in e for e in entries):
                found[lead] = spread([e[lead]["mean"] for e in entries])
                leads.setdefault(lead, []).append(found[lead]["values"])
            if all("nll" in e.get(lead, {}) for e in entries):
                found[lead + NLL] = spread([e[lead]["nll"]["mean"] for e in entries])
        result["benchmarks"][name] = found
    for lead, values in leads.items():
        result[lead] = spread([statistics.mean(of_seed) for of_seed in zip(*values, strict=True)])
    return result


def _roles(entry: dict[str, Any]) -> list[str]:
    """The models of a benchmark's summary."""
    scored = ordered(key.removesuffix("_ci95") for key in entry if key.endswith("_ci95"))
    return [*scored, *(role for role in ("student_blind",) if role in entry)]


def spread(values: list[float]) -> dict[str, Any]:
    """{mean, values} and, of two values or more, ci95: the 95 % interval of Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "values": values}
    half = T_QUANTILES.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "ci95": [mean - half, mean + half], "values": values}


def seeds_table(result: dict[str, Any]) -> str:
    """The outcome over seeds for the terminal."""
    lines = [f"{len(result['seeds'])} seeds: {', '.join(map(str, result['seeds']))}"]
    for name, found in result["benchmarks"].items():
        lines.append(f"{name} ({found['n']} questions)")
        rows = {in_words(role): _percent(found[role]) for role in found if role != "n" and not role.startswith(tuple(LEADS))}
        rows |= {words: _percent(found[lead], sign="+") for lead, words in LEADS.items() if lead in found}
        doubt = {words.replace("lead", "NLL", 1): found.get(lead + NLL) for lead, words in LEADS.items()}
        rows |= {words: _nats(difference) for words, difference in doubt.items() if difference is not None}
        width = max(map(len, rows))
        lines += [f"  {words:<{width}} {text}" for words, text in rows.items()]
    for lead, words in LEADS.items():
        lines += [f"mean {words} on all benchmarks {_percent(result[lead], sign='+')}"] if lead in result else []
    return "\n".join(lines)


def _percent(spread: dict[str, Any], sign: str = "") -> str:
    text = f"{100 * spread['mean']:{sign}.1f}"
    if "ci95" in spread:
        text += " [" + ", ".join(f"{100 * bound:{sign}.1f}" for bound in spread["ci95"]) + "]"
    return text + "  (" + ", ".join(f"{100 * v:{sign}.1f}" for v in spread["values"]) + ")"


def _nats(spread: dict[str, Any]) -> str:
    bounds = f" [{spread['ci95'][0]:+.3f}, {spread['ci95'][1]:+.3f}]" if "ci95" in spread else ""
    return f"{spread['mean']:+.3f}{bounds}  (" + ", ".join(f"{value:+.3f}" for value in spread["values"]) + ")"
