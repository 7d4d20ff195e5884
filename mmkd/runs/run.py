"""A whole run: recipe -> teacher, control, student -> evaluation of all three -> summary and report."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import DataError
from mmkd.data.samples import Sample
from mmkd.teachers.stored import CachedTower
from mmkd.train.experts import check_experts, experts_table
from mmkd.runs.stages import build_student, load_teacher, stage_samples, train, train_control
from mmkd.evaluation.answer import evaluate, refuse_unscored
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.runs.evaluate import add_importance
from mmkd.evaluation.statistics import compare_runs, verdict
from mmkd.evaluation.report import build_report
from mmkd.base.files import write_whole
from mmkd.base.distributed import alone_in, is_main_process
from mmkd.recipes.recipe import Recipe
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

ROLES = ("teacher", "control", "student")


def distill(recipe: Recipe, scored: Sequence[str] = ROLES) -> dict[str, Any]:
    """Runs a recipe to its report; started again with the same recipe it goes on where it stopped.

    `scored`: which of the models answer the benchmarks.
    Returns the summary that it writes to OUTPUT/summary.json. Raises DataError, RecipeError, TowerError, GuardError.
    """
    started = time.monotonic()
    run = Path(recipe.output)
    check_benchmarks(recipe)
    samples = {name: stage_samples(recipe, stage) for name, stage in recipe.stages.items()}
    check_answers(samples)
    texts = [t.text for stage in samples.values() for s in stage for t in s.turns]
    del samples
    with alone_in(run, "the same output"):
        claim(run, recipe)
        return _run(recipe, run, texts, scored, started)


def _run(recipe: Recipe, run: Path, texts: list[str], scored: Sequence[str], started: float) -> dict[str, Any]:
    teacher = load_teacher(recipe)
    student = build_student(recipe, teacher, texts)
    check_experts(recipe, student)
    towers: dict[str, Tower | None] = {"teacher": None if isinstance(teacher, CachedTower) else teacher}
    if isinstance(teacher, CachedTower):
        logger.info("the teacher is a cache: it is not evaluated; see `mmkd evaluate %s`", recipe.teacher.model)
    if recipe.control and teacher is not None:
        towers["control"] = train_control(recipe, student, run)
        student = build_student(recipe, teacher, texts)  # the control's training changed the first one
    towers["student"] = train(recipe, "student", student, teacher, run)
    if not is_main_process():
        return {}
    results = evaluate_all(recipe, run, {role: tower for role, tower in towers.items() if tower is not None and role in scored})
    summary = summarise(recipe, run, results, time.monotonic() - started)
    if results:
        summary["report"] = str(build_report(run))
    return summary


def check_benchmarks(recipe: Recipe) -> None:
    """Every benchmark and its data is looked for before hours of training."""
    for name in recipe.evaluation.benchmarks:
        benchmark = load_benchmark(name)
        refuse_unscored(benchmark, benchmark.read(recipe.data_root, recipe.evaluation.limit), submission=False)


def check_answers(stages: dict[str, list[Sample]]) -> None:
    for name, samples in stages.items():
        empty = [s.id for s in samples if not s.answer.strip()]
        if empty:
            raise DataError(f"stage {name}: {len(empty)} samples have an empty answer, first: {', '.join(empty[:5])}")


def claim(run: Path, recipe: Recipe) -> None:
    """Writes the resolved recipe into the run's folder; a folder of another recipe is refused with the difference."""
    wanted = recipe.model_dump(mode="json", exclude={"output", "title"})
    path = run / "recipe.yaml"
    if path.exists():
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = sorted(_differences(there, wanted))
        if differing:
            raise DataError(
                f"{run} holds a run of another recipe (differs in {', '.join(differing[:5])}); set output=ANOTHER_FOLDER or "
                "remove it"
            )
        return
    if not is_main_process():
        return
    run.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(wanted, sort_keys=False))
    facts = {"title": recipe.title, "seed": recipe.seed, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    (run / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in {*a, *b}:
            where = f"{path}.{key}" if path else str(key)
            found += _differences(a.get(key), b.get(key), where) if key in a and key in b else [where]
        return found
    return [] if a == b else [path]


def evaluate_all(recipe: Recipe, run: Path, towers: dict[str, Tower]) -> dict[str, dict[str, Any]]:
    """Every model on every benchmark: {benchmark: {role: results}}."""
    spec = recipe.evaluation
    results: dict[str, dict[str, Any]] = {}
    for name in spec.benchmarks:
        benchmark = load_benchmark(name)
        for role in [r for r in ROLES if r in towers]:
            logger.info("evaluating the %s on %s", role, name)
            options = {"data_root": recipe.data_root, "batch_size": spec.batch_size, "limit": spec.limit, "model_name": role}
            out = run / "evaluation" / role / benchmark.name
            results.setdefault(benchmark.name, {})[role] = evaluate(towers[role], benchmark, out, **options)
        if spec.blind:
            out = run / "evaluation_blind" / "student" / benchmark.name
            results[benchmark.name]["student_blind"] = evaluate(towers["student"], benchmark, out, blind=True, **options)
            seen = run / "evaluation" / "student" / benchmark.name
            results[benchmark.name]["student"] = add_importance(seen, results[benchmark.name]["student"], out)
    return results


def summarise(recipe: Recipe, run: Path, results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Scores, intervals and paired differences of a run; writes OUTPUT/summary.json."""
    benchmarks: dict[str, Any] = {}
    for name, by_role in results.items():
        roles = [r for r in ROLES if r in by_role]
        paths = {role: run / "evaluation" / role / name / "predictions.jsonl" for role in roles}
        compared = compare_runs(paths)
        entry: dict[str, Any] = {"n": compared["n"]}
        for role in roles:
            entry[role] = compared["models"][role]["score"]
            entry[f"{role}_ci95"] = compared["models"][role]["ci95"]
        for other in ("control", "teacher"):
            found = compared["differences"].get(f"student - {other}")
            if found:
                entry[f"student_minus_{other}"] = {"mean": found["difference"], "ci95": found["ci95"]}
        if "student_blind" in by_role:
            entry["student_blind"] = by_role["student_blind"]["score"]
        entry["verdict"] = compared["verdict"]
        entry["parameters"] = {role: by_role[role]["parameters"]["total"] for role in roles}
        entry["parameters_active"] = {role: by_role[role]["parameters"]["active"] for role in roles}
        benchmarks[name] = entry
    previous = _read(run / "summary.json").get("seconds", 0.0)
    summary = {"title": recipe.title, "seed": recipe.seed, "seconds": round(max(seconds, previous), 1), "benchmarks": benchmarks}
    if experts := _read(run / "experts.json"):
        summary["experts"] = experts
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _active(entry: dict[str, Any], role: str) -> str:
    """What a sparse model uses of its parameters for one token; nothing for a dense one."""
    active = entry["parameters_active"][role]
    return f", {active:,} active" if active < entry["parameters"][role] else ""


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    lines = []
    for name, entry in summary["benchmarks"].items():
        lines.append(f"{name} ({entry['n']} questions)")
        for role in [r for r in ROLES if r in entry]:
            low, high = entry[f"{role}_ci95"]
            lines.append(
                f"  {role:<8} {100 * entry[role]:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]   "
                f"{entry['parameters'][role]:>13,} parameters{_active(entry, role)}"
            )
        if "student_blind" in entry:
            lines.append(f"  student without pictures {100 * entry['student_blind']:.1f} %")
        found = entry.get("student_minus_control")
        if found:
            low, high = found["ci95"]
            lines.append(f"  student - control {100 * found['mean']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
            lines.append(f"  {verdict({'difference': found['mean'], 'ci95': found['ci95']})}")
    if "experts" in summary:
        lines.append(experts_table(summary["experts"]))
    lines.append(f"{summary['seconds']:.0f} seconds")
    return "\n".join(lines)
