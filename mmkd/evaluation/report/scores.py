"""Scores of models on benchmarks, as the page shows them: the headline, bars, paired differences, and the facts of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.evaluation.report.curves import risk_coverage
from mmkd.evaluation.report.text import count, percent, plain
from mmkd.evaluation.roles import is_control
from mmkd.evaluation.statistics import compare_runs, verdict

MAX_PAIRS = 10  # differences shown of one benchmark
MAX_BARS = 12  # values of one category
IMPORTANCE = {"needs_image": "only with the picture", "both": "also without", "hurt_by_image": "only without"}


def benchmark_entry(name: str, models: dict[str, dict]) -> dict[str, Any]:
    any_results = next(iter(models.values()))["results"]
    comparison = compare_runs({role: model["path"] for role, model in models.items()})
    best = comparison["best_control"]
    difference = comparison["differences"].get(f"student - {best}")
    calibration = {role: found for role, model in models.items() if (found := model["results"].get("calibration"))}
    return {
        "name": name,
        "title": any_results.get("title") or name,
        "metric": any_results.get("metric", "score"),
        "models": {role: model["results"] for role, model in models.items()},
        "rows": {role: model["rows"] for role, model in models.items()},
        "blind": {role: model["blind"] for role, model in models.items() if model["blind"] is not None},
        "comparison": comparison,
        "difference": difference,
        "best_control": best,
        "verdict": verdict(difference, best) if difference else None,
        "over_hard_answers": comparison["over_hard_answers"],
        "remarks": [f"{role}: {said}" for role, cell in comparison["models"].items() for said in cell.get("remarks", ())],
        "pairs": _shown_pairs(comparison["differences"], list(models)),
        "calibration": calibration,
        "risk_coverage": risk_coverage(calibration),
        "categories": _category_bars(models),
        "facts": _benchmark_facts(models),
    }


def _shown_pairs(differences: Mapping[str, Mapping], names: Sequence[str]) -> list[dict[str, Any]]:
    """The paired differences with both names; of many only those with the teacher, or else with the first model."""
    by_key = {f"{a} - {b}": (a, b) for a in names for b in names}
    pairs = [{"first": by_key[key][0], "second": by_key[key][1], **found} for key, found in differences.items()]
    pairs.sort(key=lambda pair: "teacher" in (pair["first"], pair["second"]))  # what a student gained comes first
    if len(pairs) <= MAX_PAIRS:
        return pairs
    anchor = "teacher" if "teacher" in names else names[0]
    return [pair for pair in pairs if anchor in (pair["first"], pair["second"])]


def headline(benchmarks: Sequence[Mapping]) -> dict[str, str]:
    """One sentence for the whole run, and whether it is "good", "bad" or "open"."""
    compared = [b for b in benchmarks if b["difference"]]
    if not compared and any(len(set(b["models"]) - {"teacher"}) > 1 for b in benchmarks):
        return _headline_without_control(benchmarks)
    if not compared:
        return {"text": "No control to compare with: what the teacher adds is not known.", "mood": "open"}
    ahead = [b["name"] for b in compared if b["difference"]["ci95"][0] > 0]
    behind = [b["name"] for b in compared if b["difference"]["ci95"][1] < 0]
    mood = "bad" if not ahead else "open" if behind else "good"
    if len(compared) == 1:
        words = compared[0]["verdict"].replace("student", "the student", 1)
        return {"text": f"On {compared[0]['name']} {words}.", "mood": mood}
    control = "best control" if any(sum(map(is_control, b["models"])) > 1 for b in compared) else "control"
    text = f"Student and {control} show no difference on any of {len(compared)} benchmarks"
    if ahead:
        text = f"The student leads its {control} on {len(ahead)} of {len(compared)} benchmarks: {', '.join(ahead)}"
    if behind and not ahead:
        text = f"The student leads its {control} on none of {len(compared)} benchmarks"
    if behind:
        text += f"; it is behind on {', '.join(behind)}"
    return {"text": text + ".", "mood": mood}


def _headline_without_control(benchmarks: Sequence[Mapping]) -> dict[str, str]:
    """Which model beside the teacher scores highest where, in one sentence."""
    best = Counter()
    for benchmark in benchmarks:
        scores = {name: cell["score"] for name, cell in benchmark["comparison"]["models"].items() if name != "teacher"}
        if scores:
            best[max(scores, key=scores.__getitem__)] += 1
    beside = " beside the teacher's" if any("teacher" in b["models"] for b in benchmarks) else ""
    where = ", ".join(f"{name} on {count} of {best.total()}" for name, count in best.most_common())
    return {"text": f"The highest score{beside}: {where}.", "mood": "open"}


def model_entries(benchmarks: Sequence[Mapping]) -> dict[str, dict]:
    """What is known of each model from its results: name, parameters, memory, and time over all benchmarks."""
    models: dict[str, dict] = {}
    for benchmark in benchmarks:
        for role, results in benchmark["models"].items():
            new = {"name": "", "parameters": {}, "seconds": 0.0, "questions": 0, "tokens": 0, "weights": None, "peak": None}
            model, spent = models.setdefault(role, new), results.get("efficiency", {})
            model["name"] = results.get("model") or model["name"]
            model["parameters"] = results.get("parameters") or model["parameters"]
            model["seconds"] += results.get("seconds") or 0.0
            model["questions"] += results.get("n", 0)
            model["tokens"] += spent.get("answer_tokens") or 0
            model["weights"] = spent.get("weight_bytes") or model["weights"]
            model["peak"] = max(filter(None, (model["peak"], spent.get("peak_bytes"))), default=None)
            model["dtype"] = spent.get("dtype") or model.get("dtype")
    return {role: model | {"rates": _rates(model)} for role, model in models.items()}


def _rates(model: Mapping) -> str:
    """Questions and answer tokens a second, in words; "" where the time is not known."""
    if not model["seconds"] or not model["questions"]:
        return ""
    tokens = f", {count(model['tokens'] / model['seconds'])} tokens/s" if model["tokens"] else ""
    return f"{count(model['questions'] / model['seconds'])} questions/s{tokens}"


def _category_bars(models: Mapping[str, Mapping]) -> list[dict]:
    """One block a category: its largest values with every model's score there."""
    blocks = []
    by = {role: model["results"].get("by", {}) for role, model in models.items()}
    for category in dict.fromkeys(c for groups in by.values() for c in groups):
        sizes = {
            value: cell["n"] for groups in by.values() for value, cell in groups.get(category, {}).items()
        }
        shown = sorted(sizes, key=lambda value: (-sizes[value], value))[:MAX_BARS]
        rows = [
            {
                "value": v,
                "n": sizes[v],
                "cells": {r: groups.get(category, {}).get(v) for r, groups in by.items()},
            }
            for v in shown
        ]
        if len(sizes) > 1:
            blocks.append({"name": category, "rows": rows, "left_out": len(sizes) - len(shown)})
    return blocks


def _benchmark_facts(models: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """How the benchmark was asked and scored; taken from one model, since all were asked the same."""
    results = next(iter(models.values()))["results"]
    keys = (
        "split", "rows", "expected_rows", "rows_difference", "limit", "prompt_style", "ocr_tokens", "blind",
        "parser", "metric", "max_new_tokens", "batch_size", "data_fingerprint",
    )  # fmt: skip
    facts = [(key.replace("_", " "), plain(results[key])) for key in keys if results.get(key) is not None]
    for role, model in models.items():
        own = model["results"]
        parts = [f"{own.get('n', 0)} scored", f"{own.get('n_skipped', 0)} skipped"]
        parts += [f"{count} × {reason}" for reason, count in own.get("skipped", {}).items()]
        parts += own.get("remarks", [])
        parts += [f"{percent(own['unparsed_share'])} unparsed"] if "unparsed_share" in own else []
        parts += [f"lenient parse {percent(own['score_lenient'])}"] if "score_lenient" in own else []
        parts += [f"{percent(own['neither_share'])} neither yes nor no"] if own.get("neither_share") else []
        parts += [f"{percent(own['thinking_share'])} with thinking"] if own.get("thinking_share") else []
        parts += [f"{percent(own['unclosed_thinking_share'])} end within it"] if own.get("unclosed_thinking_share") else []
        parts += [f"{metric} {percent(cell['score'])}" for metric, cell in own.get("also", {}).items()]
        parts += [_importance(own["importance"])] if own.get("importance", {}).get("n") else []
        parts += [f"weights {own['model_fingerprint']}"] if own.get("model_fingerprint") else []
        facts.append((role, ", ".join(parts)))
    versions = results.get("versions", {})
    return [*facts, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _importance(found: Mapping) -> str:
    shares = [f"right {words} {percent(found[key])}" for key, words in IMPORTANCE.items()]
    return f"of {found['n']} questions with a picture: " + ", ".join(shares)


def brought_entries(content: Any) -> list[tuple[str, list[tuple[str, dict[str, float | None]]]]]:
    """What each teacher brought, as `summary.json` has it: (stage and term, [(teacher, its facts)]); others are left out."""
    names = ("weight", "used", "agreement", "lead")
    found = []
    for stage, terms in content.items() if isinstance(content, Mapping) else ():
        for term, teachers in terms.items() if isinstance(terms, Mapping) else ():
            rows = [(name, {key: number_or_none(given.get(key)) for key in names}) for name, given in teachers.items()
                    if isinstance(given, Mapping)] if isinstance(teachers, Mapping) else []  # fmt: skip
            found.append((f"{stage}, {term}", rows))
    return [(heading, rows) for heading, rows in found if rows]


def monitor_entries(content: Any) -> list[dict[str, Any]]:
    """What held-out prompts said of each stage, as `summary.json` has it: {"stage", "rows", "hacked", "kept"}.

    rows: (when, step, proxy, golden); hacked, kept: steps or None. What is none of that is left out.
    """
    words, found = {"first": "at the start", "lowest": "at the golden minimum", "last": "at the end"}, []
    for stage, facts in content.items() if isinstance(content, Mapping) else ():
        facts = facts if isinstance(facts, Mapping) else {}
        given = [(said, facts.get(key)) for key, said in words.items()]
        rows = [(said, *(number_or_none(own.get(key)) for key in ("step", "proxy", "golden"))) for said, own in given
                if isinstance(own, Mapping)]  # fmt: skip
        rows = [row for row in rows if None not in row]
        if rows:
            kept = {key: number_or_none(facts.get(key)) for key in ("hacked", "kept")}
            found.append({"stage": stage, "rows": rows} | kept)
    return found


def number_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def facts_of(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values to show: values one level deep, deeper ones are left to the files."""
    flat = {key: _one_line(value) for key, value in content.items() if key != "title"}
    return [(key.replace("_", " "), plain(value)) for key, value in flat.items() if value is not None]


def _one_line(value: Any) -> Any:
    """A mapping of plain values as "key value, key value", None for a deeper one, anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(inner, (Mapping, list)) for inner in value.values()):
        return None
    return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
