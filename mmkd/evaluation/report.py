"""The report of a run or of several models: one HTML page that needs nothing else, made from files of evaluations alone."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.samples import TABLES, ImageRef
from mmkd.errors import DataError, ImageError
from mmkd.evaluation.compare import compare_runs, read_object, read_predictions, same_questions, verdict
from mmkd.evaluation.results import read_results

ROLES = ("teacher", "control", "student")
BLIND = "_blind"  # ending of the folders of answers without pictures
MAX_LABEL = 22  # characters of a model's name beside a bar
MAX_PAIRS = 10  # differences shown of one benchmark
TEMPLATE = "report.html.j2"
GALLERY_SIZE = 36
GALLERY_SEED = 0
THUMBNAIL = 288  # pixels, the longer side
SMALL = 160  # up to here PNG, which keeps drawn pictures sharp
MAX_POINTS = 240  # of one curve
SMOOTHING = 0.05  # share of the points under the moving mean
MAX_ANSWER = 500  # characters shown of one prediction
MAX_BARS = 12  # values of one category
NO_CURVE = {"step", "epoch", "stage", "learning_rate", "grad_norm"}

log = logging.getLogger(__name__)


def build_report(run: Path | str) -> Path:
    """Writes RUN/report.html and returns its path.

    Reads RUN/evaluation/{teacher,control,student}/<benchmark>/, RUN/evaluation_blind/ (the same below it),
    RUN/log/{student,control}.jsonl, RUN/summary.json and RUN/run.json; all but one model's evaluation may be
    missing.  The same files give the same page.
    Raises DataError when no model has been evaluated, or when models answered different questions.
    """
    run = Path(run)
    facts = _read_json(run / "run.json")
    models = {role: ModelFiles.of_run(run, role) for role in ROLES if (run / "evaluation" / role).is_dir()}
    evaluations = _read_evaluations(models)
    if not evaluations:
        raise DataError(
            f"{run} holds no evaluation ({run / 'evaluation'}/<model>/<benchmark>/results.json); "
            "run `mmkd evaluate` or `mmkd distill` first"
        )
    title = str(facts.get("title") or run.resolve().name)
    facts = [("Run", _facts(facts)), ("Summary", _facts(_read_json(run / "summary.json")))]
    return _write_page(run / "report.html", title, evaluations, models, facts)[0]


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


def build_comparison(models: Mapping[str, ModelFiles], target: Path, title: str) -> dict[str, dict[str, Any]]:
    """Writes one page for several models to the file `target`.

    A model's name is what the page calls it; "teacher", "control" and "student" have the meaning they have in a run.
    Benchmarks that one model alone has answered are shown, not compared. Returns {benchmark: what `compare_runs` gives}.
    Raises DataError where a model has no scored evaluation, or models answered different questions.
    """
    evaluations = _read_evaluations(models)
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
) -> tuple[Path, dict[str, dict[str, Any]]]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    names = [name for name in models if any(name in found for found in evaluations.values())]
    slugs = {name: name if name in ROLES else f"m{number}" for number, name in enumerate(names)}
    benchmarks = [_benchmark(name, found) for name, found in evaluations.items()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # predictions and questions are strangers' text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "count": _count, "bytes": _bytes, "seconds": _seconds}
    gallery = _gallery(benchmarks, slugs)
    page = environment.get_template(TEMPLATE).render(
        title=title,
        headline=_headline(benchmarks),
        roles=names,
        slugs=slugs,
        label_width=min(MAX_LABEL, max(map(len, names)) + 1),
        models=_models(benchmarks),
        benchmarks=benchmarks,
        charts=_charts({name: files.log for name, files in models.items() if files.log and files.log.exists()}),
        smoothing=SMOOTHING,
        gallery=gallery,
        outcomes=_outcomes(gallery),
        marks=_marks(gallery, names),
        gallery_seed=GALLERY_SEED,
        facts=[(heading, pairs) for heading, pairs in facts if pairs],
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
    return target, {benchmark["name"]: benchmark["comparison"] for benchmark in benchmarks}


# ---- reading
# ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none. Raises DataError for anything else."""
    return read_object(path) if path.exists() else {}


def _read_evaluations(models: Mapping[str, ModelFiles]) -> dict[str, dict[str, dict]]:
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


# ---- table, headline, bars
# -------------------------------------------------------------------------------------


def _benchmark(name: str, models: dict[str, dict]) -> dict[str, Any]:
    any_results = next(iter(models.values()))["results"]
    comparison = compare_runs({role: model["path"] for role, model in models.items()})
    difference = comparison["differences"].get("student - control")
    return {
        "name": name,
        "title": any_results.get("title") or name,
        "metric": any_results.get("metric", "score"),
        "models": {role: model["results"] for role, model in models.items()},
        "rows": {role: model["rows"] for role, model in models.items()},
        "blind": {role: model["blind"] for role, model in models.items() if model["blind"] is not None},
        "comparison": comparison,
        "difference": difference,
        "verdict": verdict(difference) if difference else None,
        "pairs": _shown_pairs(comparison["differences"], list(models)),
        "categories": _category_bars(models),
        "facts": _benchmark_facts(models),
    }


def _shown_pairs(differences: Mapping[str, Mapping], names: Sequence[str]) -> list[dict[str, Any]]:
    """The paired differences with both names; where there are many, those with the teacher or else the first model."""
    by_key = {f"{a} - {b}": (a, b) for a in names for b in names}
    pairs = [{"first": by_key[key][0], "second": by_key[key][1], **found} for key, found in differences.items()]
    pairs.sort(key=lambda pair: "teacher" in (pair["first"], pair["second"]))  # what a student gained stands first
    if len(pairs) <= MAX_PAIRS:
        return pairs
    anchor = "teacher" if "teacher" in names else names[0]
    return [pair for pair in pairs if anchor in (pair["first"], pair["second"])]


def _headline(benchmarks: Sequence[Mapping]) -> dict[str, str]:
    """One sentence for the whole run, and whether it is "good", "bad" or "open"."""
    compared = [b for b in benchmarks if b["difference"]]
    if not compared and any(len(set(b["models"]) - {"teacher"}) > 1 for b in benchmarks):
        return _many_headline(benchmarks)
    if not compared:
        return {"text": "No control to compare with: what the teacher adds is not known.", "mood": "open"}
    ahead = [b["name"] for b in compared if b["difference"]["ci95"][0] > 0]
    behind = [b["name"] for b in compared if b["difference"]["ci95"][1] < 0]
    mood = "bad" if not ahead else "open" if behind else "good"
    if len(compared) == 1:
        return {"text": f"On {compared[0]['name']} the {compared[0]['verdict']}.", "mood": mood}
    text = f"The student is no better than its control on any of {len(compared)} benchmarks"
    if ahead:
        text = (
            f"The student leads its control on {len(ahead)} of {len(compared)} benchmarks: {', '.join(ahead)}"
        )
    if behind:
        text += f"; it is behind on {', '.join(behind)}"
    return {"text": text + ".", "mood": mood}


def _many_headline(benchmarks: Sequence[Mapping]) -> dict[str, str]:
    """Which model beside the teacher scores highest where, in one sentence."""
    best = Counter()
    for benchmark in benchmarks:
        scores = {name: cell["score"] for name, cell in benchmark["comparison"]["models"].items() if name != "teacher"}
        if scores:
            best[max(scores, key=scores.__getitem__)] += 1
    beside = " beside the teacher's" if any("teacher" in b["models"] for b in benchmarks) else ""
    where = ", ".join(f"{name} on {count} of {best.total()}" for name, count in best.most_common())
    return {"text": f"The highest score{beside}: {where}.", "mood": "open"}


def _models(benchmarks: Sequence[Mapping]) -> dict[str, dict]:
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
    tokens = f", {_count(model['tokens'] / model['seconds'])} tokens/s" if model["tokens"] else ""
    return f"{_count(model['questions'] / model['seconds'])} questions/s{tokens}"


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
    facts = [(key.replace("_", " "), _plain(results[key])) for key in keys if results.get(key) is not None]
    for role, model in models.items():
        own = model["results"]
        parts = [f"{own['n']} scored", f"{own.get('n_skipped', 0)} skipped"]
        parts += [f"{count} × {reason}" for reason, count in own.get("skipped", {}).items()]
        parts += [f"{_percent(own['unparsed_share'])} unparsed"] if "unparsed_share" in own else []
        parts += [f"lenient parse {_percent(own['score_lenient'])}"] if "score_lenient" in own else []
        parts += [f"{metric} {_percent(cell['score'])}" for metric, cell in own.get("also", {}).items()]
        parts += [_importance(own["importance"])] if own.get("importance", {}).get("n") else []
        parts += [f"weights {own['model_fingerprint']}"] if own.get("model_fingerprint") else []
        facts.append((role, ", ".join(parts)))
    versions = results.get("versions", {})
    return [*facts, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _importance(found: Mapping) -> str:
    shares = [f"right {words} {_percent(found[key])}" for key, words in IMPORTANCE.items()]
    return f"of {found['n']} questions with a picture: " + ", ".join(shares)


IMPORTANCE = {"needs_image": "only with the picture", "both": "also without", "hurt_by_image": "only without"}


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values to show: values one level deep, deeper ones are left to the files."""
    flat = {key: _one_line(value) for key, value in content.items() if key != "title"}
    return [(key.replace("_", " "), _plain(value)) for key, value in flat.items() if value is not None]


def _one_line(value: Any) -> Any:
    """A mapping of plain values as "key value, key value", None for a deeper one, anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(inner, (Mapping, list)) for inner in value.values()):
        return None
    return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- curves
# ----------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 280, 186
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 38


@dataclass(frozen=True)
class _Scale:
    """Maps values low..high to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _read_log(path: Path) -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, str]], int]:
    """Points (step, value) of every term, where each stage begins, and how many values were not finite.

    Steps that start anew with a stage are put one behind the other.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    stages: list[tuple[float, str]] = []
    offset = last = 0.0
    broken = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step, stage = float(entry["step"]), str(entry.get("stage", ""))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s, line %d is left out of the curves: %r", path, number, error)
            continue
        if not stages or stages[-1][1] != stage:
            offset = last if stages and step + offset < last else offset
            stages.append((last if stages else step, stage))
        last = max(last, step + offset)
        for name, value in entry.items():
            if name in NO_CURVE or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if math.isfinite(value):
                terms.setdefault(name, []).append((step + offset, float(value)))
            else:
                broken += 1
    return terms, stages, broken


def _charts(paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One chart a term, the whole loss first, with a curve for every model that was trained."""
    logs = {name: _read_log(path) for name, path in sorted(paths.items(), key=lambda item: item[0] != "student")}
    names = dict.fromkeys(name for terms, _, _ in logs.values() for name in terms)
    order = sorted(names, key=lambda name: (name != "loss", list(names).index(name)))
    broken = {role: count for role, (_, _, count) in logs.items() if count}
    if broken:
        log.warning("values that are not finite are left out of the curves: %s", broken)
    charts = []
    for name in order:
        series = {role: terms[name] for role, (terms, _, _) in logs.items() if len(terms.get(name, [])) > 1}
        if series:
            stages = next(stages for role, (_, stages, _) in logs.items() if role in series)
            charts.append(_chart(name, series, stages))
    return charts


def _chart(
    name: str, series: Mapping[str, list[tuple[float, float]]], stages: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    thinned = {role: _thin(points) for role, points in series.items()}
    smooth = {role: _smooth(points) for role, points in thinned.items()}
    steps = [x for points in thinned.values() for x, _ in points]
    values = [y for points in thinned.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(steps), max(steps), 4), _ticks(min(values), max(values), 4)
    x = _Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, CHART_WIDTH - RIGHT)
    low, high = min(min(values), y_ticks[0]), max(max(values), y_ticks[-1])
    y = _Scale(low, high, CHART_HEIGHT - BOTTOM, TOP)
    ends = {role: points[-1][1] for role, points in smooth.items()}
    return {
        "name": name,
        "names": list(series),
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "box": {"left": LEFT, "right": CHART_WIDTH - RIGHT, "top": TOP, "bottom": CHART_HEIGHT - BOTTOM},
        "x_ticks": [(x(tick), f"{tick:g}") for tick in x_ticks if x.low <= tick <= x.high],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks],
        "stages": [(x(start), stage) for start, stage in stages[1:]],
        "curves": [
            {"role": role, "raw": _path(thinned[role], x, y), "smooth": _path(smooth[role], x, y)}
            for role in series
        ],
        "summary": ", ".join(f"{role} ends at {value:.4g}" for role, value in ends.items()),
    }


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(math.fsum(x for x, _ in p) / len(p), math.fsum(y for _, y in p) / len(p)) for p in pieces]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving mean, narrower towards both ends so that it starts and stops where the curve does."""
    half = max(1, round(len(points) * SMOOTHING / 2))
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = [y for _, y in points[i - reach : i + reach + 1]]
        result.append((x, math.fsum(window) / len(window)))
    return result


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `wanted` of them."""
    span = high - low or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _path(points: Iterable[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return "M" + "L".join(f"{x(px):g},{y(py):g}" for px, py in points)


# ---- gallery
# ---------------------------------------------------------------------------------------------------


def _gallery(benchmarks: Sequence[Mapping], slugs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions to look at, about GALLERY_SIZE: of each benchmark half at random, half where models part."""
    share = max(4, GALLERY_SIZE // len(benchmarks))
    return [item for benchmark in benchmarks for item in _gallery_of(benchmark, share, slugs)][
        : max(GALLERY_SIZE, 48)
    ]


def _gallery_of(benchmark: Mapping, share: int, slugs: Mapping[str, str]) -> list[dict[str, Any]]:
    runs = benchmark["rows"]
    ids = [i for i in same_questions(runs) if not any(run[i].get("skipped") for run in runs.values())]
    drawn = random.Random(GALLERY_SEED).sample(ids, len(ids))
    parting = sorted(drawn, key=lambda i: -_spread(runs, i))
    parting = [i for i in parting if _spread(runs, i) > 0][: share // 2]
    plain = [i for i in drawn if i not in set(parting)][: share - len(parting)]
    order = {i: place for place, i in enumerate(ids)}
    rows = next(iter(runs.values()))
    return [
        _gallery_item(benchmark, i, i in parting, slugs)
        for i in sorted(parting + plain, key=lambda i: (not rows[i].get("images"), order[i]))
    ]


def _spread(runs: Mapping[str, Mapping[str, dict]], question: str) -> float:
    """How far student and control (else whichever models there are) lie apart on a question."""
    pair = [runs[role] for role in ("student", "control") if role in runs]
    scores = [run[question]["score"] for run in (pair if len(pair) == 2 else runs.values())]
    return max(scores) - min(scores)


def _gallery_item(benchmark: Mapping, question: str, parted: bool, slugs: Mapping[str, str]) -> dict[str, Any]:
    rows = {role: run[question] for role, run in benchmark["rows"].items()}
    row = next(iter(rows.values()))
    scores = {role: r["score"] for role, r in rows.items()}
    return {
        "id": question,
        "benchmark": benchmark["name"],
        "title": benchmark["title"],
        "question": row.get("question") or row["prompt"],
        "choices": row.get("choices") or [],
        "prompt": row["prompt"],
        "references": _reference_text(row),
        "answers": [
            {
                "role": role,
                "text": _shorten(r["prediction"] or ""),
                "score": r["score"],
                "mark": _mark(r["score"]),
            }
            for role, r in rows.items()
        ],
        "pictures": [_thumbnail(key) for key in row.get("images") or ()],
        "chosen": "models differ" if parted else "drawn at random",
        "outcome": _outcome(scores),
        "classes": " ".join(f"{slugs[role]}-{_mark(score)}" for role, score in scores.items()),
    }


def _shorten(text: str) -> str:
    return (
        text
        if len(text) <= MAX_ANSWER
        else text[:MAX_ANSWER] + f" … ({len(text) - MAX_ANSWER:,} more characters)"
    )


def _reference_text(row: Mapping) -> list[tuple[str, int]]:
    """The reference answers with how often each was given, commonest first; a letter with its choice."""
    counts: dict[str, int] = {}
    for text in row["references"]:
        counts[text] = counts.get(text, 0) + 1
    choices = row.get("choices") or []
    named = {chr(65 + i): f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices)}
    return sorted(
        ((named.get(text, text), count) for text, count in counts.items()), key=lambda pair: -pair[1]
    )


def _mark(score: float) -> str:
    return "right" if score >= 0.995 else "wrong" if score <= 0 else "partly"


OUTCOMES = {
    "gain": "student better than control",
    "loss": "control better than student",
    "right": "all fully right",
    "wrong": "all wrong",
    "other": "anything else",
}


def _outcome(scores: Mapping[str, float]) -> str:
    student, control = scores.get("student"), scores.get("control")
    if student is not None and control is not None and student != control:
        return "gain" if student > control else "loss"
    marks = {_mark(score) for score in scores.values()}
    return marks.pop() if marks in ({"right"}, {"wrong"}) else "other"


def _outcomes(gallery: Sequence[Mapping]) -> list[tuple[str, str, int]]:
    counts = {key: sum(item["outcome"] == key for item in gallery) for key in OUTCOMES}
    return [(key, text, counts[key]) for key, text in OUTCOMES.items() if counts[key]]


MARKS = {"right": "right", "partly": "partly right", "wrong": "wrong"}


def _marks(gallery: Sequence[Mapping], roles: Sequence[str]) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """For each model the marks that its answers got, with how many: [(role, [(mark, words, count), ...]), ...]."""
    found = []
    for role in roles:
        counts = Counter(answer["mark"] for item in gallery for answer in item["answers"] if answer["role"] == role)
        if len(counts) > 1:
            found.append((role, [(mark, words, counts[mark]) for mark, words in MARKS.items() if counts[mark]]))
    return found


def _thumbnail(key: str) -> dict[str, Any]:
    """The picture as a data URI, small; or why there is none."""
    try:
        picture = _image_ref(key).load()
    except ImageError as error:
        log.warning("the report shows no picture for %s: %s", key, error)
        return {"name": Path(key).name, "uri": None}
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, options = ("png", {}) if max(picture.size) <= SMALL else ("jpeg", {"quality": 82})
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {
        "name": Path(key).name,
        "uri": f"data:image/{kind};base64,{data}",
        "width": picture.width,
        "height": picture.height,
    }


def _image_ref(key: str) -> ImageRef:
    """The reference that `ImageRef.key` was made from: a member of a zip archive, a cell of a table, or a file."""
    for suffix in (".zip", *TABLES):
        archive, found, member = key.partition(f"{suffix}/")
        if found and Path(archive + suffix).is_file():
            return ImageRef(Path(archive + suffix), member)
    return ImageRef(Path(key).parent, Path(key).name)


# ---- numbers as text
# -------------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _count(value: float) -> str:
    """1234567 -> "1.23 M", 37.2833 -> "37.3"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    """1234567 -> "1.23 MB"."""
    return _count(value).replace(" B", " G").replace(" k", " K") + ("B" if value >= 1000 else " B")


def _seconds(value: float) -> str:
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"
