"""Writes the page: one HTML file that needs nothing else, made from the files of evaluations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.base.files import write_whole
from mmkd.errors import DataError
from mmkd.evaluation.report.curves import SMOOTHING, charts
from mmkd.evaluation.report.files import ModelFiles, read_evaluations, read_facts, roles_of
from mmkd.evaluation.report.gallery import GALLERY_SEED, gallery_of, marks, outcomes
from mmkd.evaluation.report.scores import benchmark_entry, brought_entries, facts_of, headline, model_entries, monitor_entries
from mmkd.evaluation.report.text import byte_count, count, percent, points, seconds
from mmkd.evaluation.roles import in_words

TEMPLATE = "page.html.j2"
# Models that have a colour and a mark of their own; all others take theirs by number.
MARKED = ("teacher", "control", "student")
HUES, FREE = 6, 2  # colours by number, and the first that is none of the marked models'
MAX_LABEL = 24  # characters of a model's name beside a bar


def build_report(run: Path | str) -> Path:
    """Writes RUN/report.html and returns its path.

    Reads RUN/evaluation/{teacher,control,control_NAME,student}/<benchmark>/, RUN/evaluation_blind/ (the same below it),
    RUN/log/{student,control,...}.jsonl, RUN/summary.json and RUN/run.json; all but one model's evaluation may be
    missing.  The same files give the same page.
    Raises DataError when no model has been evaluated, or when models answered different questions.
    """
    run = Path(run)
    facts = read_facts(run / "run.json")
    models = {role: ModelFiles.of_run(run, role) for role in roles_of(run)}
    evaluations = read_evaluations(models)
    if not evaluations:
        raise DataError(
            f"{run} holds no evaluation ({run / 'evaluation'}/<model>/<benchmark>/results.json); "
            "run `mmkd evaluate` or `mmkd distill` first"
        )
    title = str(facts.get("title") or run.resolve().name)
    summary = read_facts(run / "summary.json")
    brought = brought_entries(summary.pop("brought", {}))
    monitored = monitor_entries(summary.pop("monitor", {}))
    facts = [("Run", facts_of(facts)), ("Summary", facts_of(summary))]
    return _write_page(run / "report.html", title, evaluations, models, facts, brought, monitored)[0]


def build_comparison(models: Mapping[str, ModelFiles], target: Path, title: str) -> dict[str, dict[str, Any]]:
    """Writes one page for several models to the file `target`.

    A model's name is what the page calls it; "teacher", "control", "control_NAME" and "student" mean what they mean in a run.
    Benchmarks that one model alone has answered are shown, not compared. Returns {benchmark: what `compare_runs` gives}.
    Raises DataError where a model has no scored evaluation, or models answered different questions.
    """
    evaluations = read_evaluations(models)
    without = [name for name in models if not any(name in found for found in evaluations.values())]
    if without:
        folder = models[without[0]].answers
        raise DataError(
            f"{without[0]}: {folder} holds no scored evaluation (<benchmark>/results.json); run `mmkd evaluate` first, "
            "and use a split with answers"
        )
    return _write_page(target, title, evaluations, models, [])[1]


def _write_page(
    target: Path,
    title: str,
    evaluations: Mapping[str, dict[str, dict]],
    models: Mapping[str, ModelFiles],
    facts: Sequence[tuple[str, list[tuple[str, str]]]],
    brought: Sequence[tuple[str, list[tuple[str, dict[str, float | None]]]]] = (),
    monitored: Sequence[Mapping[str, Any]] = (),
) -> tuple[Path, dict[str, dict[str, Any]]]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    names = [name for name in models if any(name in found for found in evaluations.values())]
    others = [name for name in models if name not in names]  # trained, but not evaluated or no longer
    unmarked = [name for name in (*names, *others) if name not in MARKED]
    slugs = {name: f"m{unmarked.index(name)}" if name in unmarked else name for name in (*names, *others)}
    first = FREE if len(unmarked) < len(slugs) else 0
    hues = {f"m{number}": (first + number) % HUES for number in range(len(unmarked))}
    benchmarks = [benchmark_entry(name, found) for name, found in evaluations.items()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # questions and predictions are untrusted text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "count": count, "bytes": byte_count, "seconds": seconds}
    environment.filters["in_words"] = in_words
    gallery = gallery_of(benchmarks, slugs)
    page = environment.get_template(TEMPLATE).render(
        title=title,
        headline=headline(benchmarks),
        roles=names,
        slugs=slugs,
        hues=hues,
        label_width=min(MAX_LABEL, max(len(in_words(name)) for name in names) + 1),
        models=model_entries(benchmarks),
        benchmarks=benchmarks,
        charts=charts({name: files.log for name, files in models.items() if files.log and files.log.exists()}),
        smoothing=SMOOTHING,
        gallery=gallery,
        outcomes=outcomes(gallery),
        marks=marks(gallery, names),
        gallery_seed=GALLERY_SEED,
        brought=brought,
        monitored=monitored,
        facts=[(heading, pairs) for heading, pairs in facts if pairs],
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page, errors="xmlcharrefreplace")
    return target, {benchmark["name"]: benchmark["comparison"] for benchmark in benchmarks}
