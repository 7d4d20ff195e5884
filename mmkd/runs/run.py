"""A whole run: recipe -> teacher, controls, student -> evaluation of all -> summary and report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.base.distributed import alone_in, is_main_process
from mmkd.base.files import write_whole
from mmkd.base.jsonl import read_object
from mmkd.base.run_folder import claim, day_of, restart
from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate, refuse_unscored
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.items import refuse_missing_pictures
from mmkd.evaluation.model_card import write_model_card
from mmkd.evaluation.report import build_report
from mmkd.evaluation.roles import HARD_ANSWERS, in_words, is_control, ordered
from mmkd.evaluation.statistics import compare_runs
from mmkd.recipes.recipe import CHANGEABLE, Recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.brought import brought, brought_lines
from mmkd.runs.control import FACTS, train_controls
from mmkd.runs.data import all_samples, files_of, rows_left_out, texts_of
from mmkd.runs.dates import with_day
from mmkd.runs.evaluate import add_importance
from mmkd.runs.hacking import monitor_facts, monitor_lines
from mmkd.runs.kept import keeps, with_kept_teacher
from mmkd.runs.plateau import plateau_facts
from mmkd.runs.preflight import preflight
from mmkd.runs.records import records
from mmkd.runs.stages import train
from mmkd.runs.survey import AT_START
from mmkd.runs.teacher_answers import with_teacher_answers
from mmkd.runs.towers import build_student, load_teachers
from mmkd.runs.validation import validation_benchmarks
from mmkd.runs.work import Work
from mmkd.runs.writes import with_written
from mmkd.teachers.teacher import Teacher
from mmkd.towers.tower import Tower
from mmkd.train.experts import experts_table
from mmkd.train.skips import skipped_counts

logger = logging.getLogger(__name__)

BLIND = "student_blind"  # the student asked without its pictures


def distill(recipe: Recipe, scored: Sequence[str] | None = None, *, anew: bool = False) -> dict[str, Any]:
    """Runs a recipe to its report; started again with the same recipe it goes on where it stopped.

    `scored`: roles of the models that answer the benchmarks; None: all.  `anew`: what the folder holds of a run is deleted first.
    Returns the summary that it writes to OUTPUT/summary.json. Raises DataError, RecipeError, TowerError, GuardError.
    """
    started = time.monotonic()
    run = Path(recipe.output)
    check_benchmarks(recipe)
    texts = texts_of(all_samples(recipe))
    with alone_in(run, "the same output"):
        if anew:
            restart(run)
        content = recipe.model_dump(mode="json", exclude={"output", "title"})
        claim(run, content, title=recipe.title, seed=recipe.seed, data=files_of(recipe), changeable=CHANGEABLE)
        teachers = load_teachers(recipe)
        student = build_student(recipe, teachers, texts)
        recipe = with_teacher_answers(with_day(recipe, day_of(run), student, teachers), teachers)
        recipe = with_answers_apart(recipe, student, teachers)
        preflight(recipe, student, teachers, most=AT_START)
        if recipe.writes:
            recipe = with_answers_apart(with_written(recipe, teachers, student), student, teachers)
            preflight(recipe, student, teachers, most=AT_START)
        towers, live = teachers_to_score(recipe, teachers), teachers
        if keeps(recipe):
            recipe = with_kept_teacher(recipe, live)
            teachers = load_teachers(recipe)
        work = Work(recipe, student, teachers)
        if recipe.controls and (teachers or recipe.writes):
            towers |= train_controls(recipe, lambda: build_student(recipe, live, texts), teachers, run, live, work)
        towers["student"] = train(recipe, "student", student, teachers, run, work)
        if not is_main_process():
            return {}
        asked = {role: tower for role, tower in towers.items() if scored is None or role in scored}
        results = evaluate_all(recipe, run, asked)
        summary = summarise(recipe, run, results, time.monotonic() - started)
        if results:
            summary["report"] = str(build_report(run))
            write_model_card(run)
        return summary


def teachers_to_score(recipe: Recipe, teachers: Mapping[str, Teacher]) -> dict[str, Tower]:
    """The teachers that answer the benchmarks: those whose model is loaded for themselves."""
    for name in (n for n, teacher in teachers.items() if teacher.stored):
        logger.info("the %s is a cache: it is not evaluated; see `mmkd evaluate %s`", name, recipe.teacher_specs[name].model)
    return {n: t.running() for n, t in teachers.items() if not (t.stored or t.remote or t.of_student)}


def check_benchmarks(recipe: Recipe) -> None:
    """Every benchmark and its data is looked for before hours of training."""
    for name in recipe.evaluation.benchmarks:
        benchmark = load_benchmark(name)
        questions = benchmark.read(recipe.data_root, recipe.evaluation.limit)
        refuse_unscored(benchmark, questions, submission=False)
        refuse_missing_pictures(benchmark, questions, recipe.data_root)
    for benchmark in validation_benchmarks(recipe):
        refuse_unscored(benchmark, benchmark.read(recipe.data_root, recipe.evaluation.validation.limit), submission=False)


def evaluate_all(recipe: Recipe, run: Path, towers: dict[str, Tower]) -> dict[str, dict[str, Any]]:
    """Every model on every benchmark: {benchmark: {role: results}}."""
    spec = recipe.evaluation
    results: dict[str, dict[str, Any]] = {}
    for name in spec.benchmarks:
        benchmark = load_benchmark(name)
        for role in ordered(towers):
            logger.info("evaluating the %s on %s", in_words(role), name)
            options = {"data_root": recipe.data_root, "batch_size": spec.batch_size, "limit": spec.limit, "model_name": role}
            out = run / "evaluation" / role / benchmark.name
            results.setdefault(benchmark.name, {})[role] = evaluate(towers[role], benchmark, out, **options)
        if spec.blind:
            out = run / "evaluation_blind" / "student" / benchmark.name
            results[benchmark.name][BLIND] = evaluate(towers["student"], benchmark, out, blind=True, **options)
            seen = run / "evaluation" / "student" / benchmark.name
            results[benchmark.name]["student"] = add_importance(seen, results[benchmark.name]["student"], out)
    return results


def summarise(recipe: Recipe, run: Path, results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Scores, intervals and paired differences of a run; writes OUTPUT/summary.json."""
    benchmarks: dict[str, Any] = {}
    facts = _read(run / FACTS)
    for name, by_role in results.items():
        roles = [role for role in ordered(by_role) if role != BLIND]
        paths = {role: run / "evaluation" / role / name / "predictions.jsonl" for role in roles}
        compared = compare_runs(paths)
        entry: dict[str, Any] = {"n": compared["n"]}
        for role in roles:
            entry[role] = compared["models"][role]["score"]
            entry[f"{role}_ci95"] = compared["models"][role]["ci95"]
            if said := compared["models"][role].get("remarks"):
                entry.setdefault("remarks", {})[role] = said
        for other in ("control", HARD_ANSWERS, "teacher"):
            if found := compared["differences"].get(f"student - {other}"):
                named = {"name": facts[other]["name"]} if other == HARD_ANSWERS and other in facts else {}
                entry[f"student_minus_{other}"] = _lead(found) | named
        entry |= _controls(compared, facts)
        if doubt := {role: found for role in roles if (found := by_role[role].get("calibration"))}:
            entry["calibration"] = {role: {k: v for k, v in found.items() if k != "curve"} for role, found in doubt.items()}
        if BLIND in by_role:
            entry[BLIND] = by_role[BLIND]["score"]
        entry["verdict"] = compared["verdict"]
        if compared["over_hard_answers"] is not None:
            entry["over_hard_answers"] = compared["over_hard_answers"]
        entry["parameters"] = {role: by_role[role]["parameters"]["total"] for role in roles}
        entry["parameters_active"] = {role: by_role[role]["parameters"]["active"] for role in roles}
        benchmarks[name] = entry
    before = _before(run / "summary.json")
    seconds = round(max(seconds, _seconds(before)), 1)
    summary = {"title": recipe.title, "seed": recipe.seed, "seconds": seconds, "benchmarks": benchmarks}
    summary |= records(recipe, benchmarks, before)
    if ended := plateau_facts(run, "student"):
        summary["plateau"] = ended
    if watched := monitor_facts(run, "student"):
        summary["monitor"] = watched
    if by_stage := brought(recipe, run):
        summary["brought"] = by_stage
    if experts := _read(run / "experts.json"):
        summary["experts"] = experts
    skipped = {role: counts for role in ("control", "student") if (counts := skipped_counts(run, role))}
    if skipped:
        summary["skipped"] = skipped
    if rows := rows_left_out(recipe):
        summary["rows_left_out"] = rows
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _controls(compared: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Each control's score, time and steps, and the student's lead over the one that scores highest."""
    found = {
        facts[role]["name"]: {
            "score": cell["score"], "ci95": cell["ci95"], "seconds": facts[role]["seconds"], "steps": facts[role]["steps"],
            **{key: facts[role][key] for key in ("plateau", "tuned") if key in facts[role]},
        }
        for role, cell in compared["models"].items() if role in facts
    }  # fmt: skip
    lead = compared["differences"].get(f"student - {compared['best_control']}")
    if lead is None:
        return {"controls": found} if found else {}
    name = facts.get(compared["best_control"], {}).get("name", compared["best_control"])
    return {"controls": found, "student_minus_best_control": {**_lead(lead), "name": name}}


def _lead(difference: dict[str, Any]) -> dict[str, Any]:
    """A paired difference as summary.json has it."""
    lead = {"mean": difference["difference"], "ci95": difference["ci95"]}
    if found := difference.get("nll"):
        after = found["after_temperature"]
        lead["nll"] = {"mean": found["difference"], "ci95": found["ci95"], "n": found["n"]}
        lead["nll"]["after_temperature"] = {"mean": after["difference"], "ci95": after["ci95"]}
    return lead


def _before(path: Path) -> dict[str, Any]:
    """What a run was summarised as before; a summary that was damaged is written anew."""
    try:
        return _read(path)
    except DataError as error:
        logger.warning("%s", error)
        return {}


def _seconds(before: dict[str, Any]) -> float:
    """How long the run took when it was summarised before."""
    seconds = before.get("seconds", 0.0)
    return seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _active(entry: dict[str, Any], role: str) -> str:
    """What a sparse model uses of its parameters for one token; nothing for a dense one."""
    active = entry["parameters_active"][role]
    return f", {active:,} active" if active < entry["parameters"][role] else ""


def _counts(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in reasons.items())


def _doubt(calibration: dict[str, Any], width: int) -> list[str]:
    """How far each model's probabilities can be trusted, a line each."""
    if not calibration:
        return []
    head = f"  {'':<{width}} {'NLL':>6} {'at its best temperature':>24} {'calibration error':>18} {'surest third right':>19}"
    lines = [head]
    for role, found in calibration.items():
        after = found["after_temperature"]["nll"]["value"]
        lines.append(
            f"  {in_words(role):<{width}} {found['nll']['value']:6.3f} {after:24.3f} {100 * found['ece']['value']:16.1f} % "
            f"{100 * found['most_confident_third']['value']:17.1f} %"
        )
    return lines


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    lines = []
    for name, entry in summary["benchmarks"].items():
        lines.append(f"{name} ({entry['n']} questions)")
        width = max(len(in_words(role)) for role in entry["parameters"])
        for role in ordered(entry["parameters"]):
            low, high = entry[f"{role}_ci95"]
            lines.append(
                f"  {in_words(role):<{width}} {100 * entry[role]:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]   "
                f"{entry['parameters'][role]:>13,} parameters{_active(entry, role)}"
            )
            lines += [f"           {said}" for said in entry.get("remarks", {}).get(role, ())]
        if "student_blind" in entry:
            lines.append(f"  student without pictures {100 * entry['student_blind']:.1f} %")
        lines += _doubt(entry.get("calibration", {}), width)
        if any(is_control(role) for role in entry["parameters"]):
            lines.append(f"  {entry['verdict']}")
        if "over_hard_answers" in entry:
            lines.append(f"  {entry['over_hard_answers']}")
    lines += brought_lines(summary.get("brought", {}))
    lines += monitor_lines(summary.get("monitor", {}))
    if "experts" in summary:
        lines.append(experts_table(summary["experts"]))
    for stage, reasons in summary.get("rows_left_out", {}).items():
        lines.append(f"rows of stage {stage} that cannot be used: {sum(reasons.values())} ({_counts(reasons)})")
    for role, stages in summary.get("skipped", {}).items():
        for stage, reasons in stages.items():
            lines.append(f"left out of the {role}'s stage {stage}: {sum(reasons.values())} samples ({_counts(reasons)})")
    lines.append(f"{summary['seconds']:.0f} seconds")
    return "\n".join(lines)
