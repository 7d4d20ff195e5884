"""The model card of a run's student, RUN/student/README.md: made from the records in the run's folder alone."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.files import write_whole
from mmkd.base.jsonl import read_object
from mmkd.base.run_folder import FACTS, RECIPE
from mmkd.base.yaml_files import read_mapping
from mmkd.errors import DataError, one_line
from mmkd.evaluation.report.text import percent, plain, points, seconds
from mmkd.evaluation.roles import HARD_ANSWERS, STUDENT, TEACHER, in_words, is_control, ordered

logger = logging.getLogger(__name__)

CARD, TEMPLATE = "README.md", "model_card.md.j2"
OURS = "<!-- mmkd wrote this card"  # how the line begins that tells a card of any version from a README of somebody else
MARKER = f"{OURS} from its run's records and writes it again; delete this line to keep changes of your own. -->"
LONGEST = 1000  # characters of a text that comes from the data, a recipe or a folder
NOTHING_SHOWN = "no difference shown"
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#!|~&$@\"]|:(?=/)|(?<=www)\.", re.I)
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[\\/]+[^\s\\/:;,'\"()]+){2,}[\\/]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Ready(str):
    """Text that is Markdown already; all other text is escaped."""


def write_model_card(run: Path | str) -> Path | None:
    """Writes RUN/student/README.md and returns its path; None where there is nothing to say or the place is taken.

    Reads RUN/summary.json, RUN/run.json, RUN/recipe.yaml, RUN/student/config.json and the student's results.json files. The
    same files give the same card, and one that is there already is not touched. Another README.md than mmkd's is kept.
    Raises DataError where a record is damaged.
    """
    run = Path(run)
    target = run / STUDENT / CARD
    if not target.parent.is_dir() or not (run / "summary.json").exists() or not (run / RECIPE).exists():
        return None
    before = _there(target)
    if before is not None and not any(line.startswith(OURS) for line in before.splitlines()):
        logger.warning("%s is not of mmkd: it is kept, and no model card is written", target)
        return None
    text = model_card(run)
    if text != before:
        try:
            write_whole(target, text, errors="replace")
        except OSError as error:
            raise DataError(f"{target} cannot be written: {error.strerror}") from error
    return target


def model_card(run: Path) -> str:
    """The card's text. Raises DataError where a record is damaged."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Ready) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    summary, recipe = read_object(run / "summary.json"), read_mapping(run / RECIPE, "run's recipe")
    begun = read_object(run / FACTS) if (run / FACTS).exists() else {}
    try:
        content = _content(run, summary, begun, recipe)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{run}: the records are not those of a run (summary.json, {FACTS} or {RECIPE}: {type(error).__name__}: "
            f"{one_line(error)}); the same `mmkd distill` command writes summary.json again"
        ) from error
    return environment.get_template(TEMPLATE).render(content)


def escaped(value: object) -> str:
    """A value as text that Markdown shows as it stands, on one line; of a path the last name alone."""
    text = "".join(" " if c.isspace() else "" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(value))
    text = _PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], one_line(text, LONGEST))
    return _SPECIAL.sub(lambda found: "\\" + found[0], text)


def _there(target: Path) -> str | None:
    """What stands in the card's place: None for nothing, "" for what is not a text of ours."""
    if target.is_symlink() or (target.exists() and not target.is_file()):
        return ""
    try:
        return target.read_bytes().decode("utf-8") if target.exists() else None
    except (OSError, UnicodeDecodeError):
        return ""


def _content(run: Path, summary: Mapping, begun: Mapping, recipe: Mapping) -> dict[str, Any]:
    hub = summary.get("hub", {})
    stages = {name: stage for name, stage in recipe["stages"].items() if isinstance(stage, Mapping) and "terms" in stage}
    benchmarks = [_benchmark(name, entry) for name, entry in summary["benchmarks"].items()]
    teachers = {TEACHER: recipe["teacher"]} if recipe.get("teacher") else dict(recipe.get("teachers") or {})
    results = _student_results(run)
    config = read_object(run / STUDENT / "config.json") if (run / STUDENT / "config.json").exists() else {}
    return {
        "front_matter": _front_matter(hub),
        "marker": Ready(MARKER),
        "title": summary.get("title") or begun.get("title") or "A distilled student",
        "headline": _headline(summary["benchmarks"]),
        "teachers": _listed(_model(spec, hub, name) for name, spec in teachers.items()),
        "student": _origin(recipe["student"], hub),
        "dtype": recipe["student"].get("dtype", "float32"),
        "teacher_lines": [_teacher(name, spec, hub) for name, spec in teachers.items()],
        "benchmarks": benchmarks,
        "has_nll": any("likelihood" in row["what"] for found in benchmarks for row in found["differences"]),
        "seed": summary.get("seed", "not recorded"),
        "stages": [_stage(name, stage, summary) for name, stage in stages.items()],
        "written": _listed(recipe.get("writes") or {}),
        "left_out": list(_left_out(summary)) or ["Nothing that the run recorded."],
        "pictures": list(_pictures(recipe.get("guards", {}), summary["benchmarks"], results)),
        "own_parts": "mmkd" in str(config),
        "facts": list(_facts(summary, begun, recipe, results)),
    }


def _front_matter(hub: Mapping) -> Ready:
    """What the hub reads; names of local folders mean nothing there and are left out."""
    bases = hub.get(STUDENT, [])
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if bases := [name for name in bases if HUB_ID.fullmatch(name)]:
        content["base_model"] = bases[0] if len(bases) == 1 else bases
    content["tags"] = ["mmkd", "distillation", "vision-language-model"]
    return Ready("---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + "---")


# ---- scores ----------------------------------------------------------------------------------------------------------


def _headline(benchmarks: Mapping[str, Mapping]) -> str:
    """On how many benchmarks the student is ahead of the best control, and of hard answers."""
    said = []
    others = {"best_control": "its best teacher-free control", HARD_ANSWERS: "hard answers"}
    for key, other in ((f"student_minus_{name}", words) for name, words in others.items()):
        words = [_words(entry[key]["ci95"]) for entry in benchmarks.values() if key in entry]
        if words:
            shown = {"ahead": "ahead", "behind": "behind", "open": NOTHING_SHOWN}
            counts = [f"{shown[word]} on {words.count(word)} of {len(words)}" for word in shown if word in words]
            said.append(f"against {other}: {', '.join(counts)}")
    if not said:
        return "What the teacher adds is not known: no control was evaluated."
    return f"The student's scores on its benchmarks, {'; '.join(said)}."


def _benchmark(name: str, entry: Mapping) -> dict[str, Any]:
    rows = []
    roles = ordered(entry["parameters"])
    for role in roles:
        total, active = entry["parameters"][role], entry.get("parameters_active", {}).get(role)
        size = f"{total:,}" + (f", {active:,} active" if active is not None and active < total else "")
        score, ci95 = percent(entry[role]), _span(entry[f"{role}_ci95"])
        rows.append({"model": in_words(role), "score": score, "ci95": ci95, "parameters": size})
    if "student_blind" in entry:
        score = percent(entry["student_blind"])
        rows.append({"model": "student without pictures", "score": score, "ci95": "not computed", "parameters": ""})
    remarks = [f"{in_words(role)}: {said}" for role, found in entry.get("remarks", {}).items() for said in found]
    differences = list(_differences(entry))
    return {"name": name, "n": entry["n"], "rows": rows, "differences": differences, "remarks": remarks,
            "has_control": any(map(is_control, roles))}  # fmt: skip


def _differences(entry: Mapping) -> Iterator[dict[str, str]]:
    best = entry.get("student_minus_best_control", {}).get("name", "")
    for key, other in (
        ("student_minus_best_control", f"best control ({best.replace('_', ' ')})"),
        (f"student_minus_{HARD_ANSWERS}", "hard answers"),
        ("student_minus_teacher", "teacher"),
    ):
        if key not in entry:
            continue
        found = entry[key]
        words = {"ahead": "the student is ahead", "behind": "the student is behind"}.get(_words(found["ci95"]), NOTHING_SHOWN)
        yield {"what": f"student − {other}", "mean": points(found["mean"]), "ci95": _span(found["ci95"], points), "words": words}
        if after := found.get("nll", {}).get("after_temperature"):
            words = {"ahead": "worse", "behind": "better"}.get(_words(after["ci95"]), NOTHING_SHOWN)
            what = f"student − {other}, negative log-likelihood (no points)"
            yield {"what": what, "mean": _nats(after["mean"]), "ci95": _span(after["ci95"], _nats), "words": words}


def _words(ci95: list[float]) -> str:
    low, high = ci95
    return "ahead" if low > 0 else "behind" if high < 0 else "open"


def _nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _span(ci95: list[float], written: Any = percent) -> str:
    low, high = ci95
    return f"{written(low)} to {written(high)}"


# ---- what taught what ------------------------------------------------------------------------------------------------


def _listed(names: Any) -> str:
    return ", ".join(names)


def _local(name: str) -> str:
    """Of a folder, or what may be one, the last name."""
    return re.split(r"[\\/]", str(name).rstrip("\\/"))[-1]


def _name(model: str, hub_ids: list[str]) -> str:
    name = model.removeprefix("hf-hub:")
    return name if name in hub_ids or name.startswith(("timm:", "open_clip:")) else _local(name)


def _model(spec: Mapping, hub: Mapping, role: str) -> str:
    own = {"start": "as the stage began", "ema": "as the moving average of its weights", "current": "as it is at each step"}
    if spec.get("self"):
        return f"the student itself ({own[spec['self']]})"
    return _name(spec["model"], hub.get(role, []))


def _teacher(name: str, spec: Mapping, hub: Mapping) -> str:
    dtype = spec.get("quantise") or spec.get("dtype", "auto")
    facts = [] if spec.get("self") else ["weights as they are stored" if dtype == "auto" else f"weights in {dtype}"]
    facts += ["asked at a server"] if spec.get("served") else []
    facts += ["read from a cache"] if spec.get("cache") else []
    label = "Teacher" if name == TEACHER else f"Teacher {name}"
    return f"{label}: {', '.join([_model(spec, hub, name), *facts])}"


def _origin(spec: Mapping, hub: Mapping) -> str:
    ids = hub.get(STUDENT, [])
    if spec.get("model"):
        fresh = " with a fresh vision encoder" if spec.get("fresh") else ""
        return _name(spec["model"], ids) + fresh
    parts = []
    for part in ("vision", "language"):
        found = spec["assemble"][part]
        source = found.get("source")
        kind = (found.get("config") or {}).get("model_type", "a configuration")
        parts.append(f"{part} {_name(source, ids)}" if source else f"{part} {kind} with random weights")
    return f"parts put together ({', '.join(parts)}, projector {spec['assemble'].get('projector', 'mlp')})"


def _stage(name: str, stage: Mapping, summary: Mapping) -> dict[str, Any]:
    ended = summary.get("plateau", {}).get(name)
    length = f"{stage['steps']} steps" if stage.get("steps") else f"{plain(stage.get('epochs') or 1)} epochs"
    if ended:
        length = f"{ended['steps']} steps until the plateau, step {ended['best']} kept"
    watched = summary.get("monitor", {}).get(name)
    if watched and watched.get("kept") is not None:
        length = f"{watched['steps']} steps, step {watched['kept']} kept, the best on held-out prompts"
    optimiser = stage.get("optimiser", {})
    lines = [f"Precision: {stage.get('precision', 'not recorded')}"]
    if optimiser:
        lines.append(f"Learning rate {plain(optimiser['learning_rate'])}, batches of {optimiser['batch_size']}")
    lines += [f"Trained: {_listed(stage['train'])}"] if stage.get("train") else []
    lines += [f"Through low-rank adapters: rank {stage['lora'].get('rank', 'not recorded')}"] if stage.get("lora") else []
    if held := stage.get("quantise"):
        lines.append(f"Through weights in {held['format']}, which this model has: {_listed(held['parts'])}")
    counts = summary.get("samples", {}).get(name, [])
    data = [_entry(spec, counts[number] if number < len(counts) else None) for number, spec in enumerate(stage.get("data", []))]
    terms = _listed(_term(*term) for term in stage["terms"].items())
    return {"name": name, "length": length, "terms": terms, "lines": lines, "data": data}


def _term(name: str, spec: Any) -> str:
    if not isinstance(spec, Mapping):
        return f"{name} × {plain(spec)}"
    kind = spec.get("kind", name)
    teacher = f" from {spec['teacher']}" if isinstance(spec.get("teacher"), str) else ""
    return f"{kind}{f' ({name})' if kind != name else ''}{teacher} × {plain(spec.get('weight', 1.0))}"


def _entry(spec: Mapping, count: int | None) -> dict[str, str]:
    root = spec.get("root") or ""
    known = spec.get("format") == "datasets" and HUB_ID.fullmatch(root)
    own = _local(spec.get("card") or "") or (root if known else _local(root))
    where = f"rows of stage {spec['from']}" if spec.get("from") else own
    limit = f"at most {spec['limit']:,}" if spec.get("limit") else "not recorded"
    answers = {"teacher": "the teacher's answers", "majority": "majority labels", "sampled": "sampled labels"}
    use = [f"split {spec.get('split', 'train')}", answers.get(spec.get("target"), "labels")]
    use += [f"weight {plain(spec['weight'])}"] if spec.get("weight", 1) != 1 else []
    name = f"{where or 'data'} ({spec['format']})" if spec.get("format") else where or "data"
    return {"name": name, "samples": f"{count:,}" if count is not None else limit, "use": _listed(use)}


# ---- left out, pictures, facts ---------------------------------------------------------------------------------------


def _left_out(summary: Mapping) -> Iterator[str]:
    for stage, reasons in summary.get("rows_left_out", {}).items():
        yield f"Stage {stage}, rows that cannot be used: {_counts(reasons)}"
    for role, stages in summary.get("skipped", {}).items():
        for stage, reasons in stages.items():
            yield f"Stage {stage}, samples left out of the training of the {in_words(role)}: {_counts(reasons)}"


def _counts(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _pictures(guards: Mapping, benchmarks: Mapping[str, Mapping], results: Mapping[str, Mapping]) -> Iterator[str]:
    checks = {
        "pixels_matter": "a run stops where other pictures change nothing that a model computes",
        "teacher_is_better": "a run stops where the teacher's loss on training answers is not below the untrained student's",
    }
    for key, what in checks.items():
        yield f"Check before training {'on' if guards.get(key) else 'off'}: {what} (guards.{key})"
    blind = {name: entry for name, entry in benchmarks.items() if "student_blind" in entry}
    for name, entry in blind.items():
        yield f"{name}: {percent(entry[STUDENT])} with pictures, {percent(entry['student_blind'])} without"
    for name, found in results.items():
        if share := found.get("importance", {}).get("needs_image"):
            yield f"{name}: {percent(share)} of the questions are right only with the picture"
    if not blind:
        yield "The student was not asked without its pictures (evaluation.blind is off)."


def _student_results(run: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((run / "evaluation" / STUDENT).glob("*/results.json"))
    return {path.parent.name: read_object(path) for path in paths}


def _facts(summary: Mapping, begun: Mapping, recipe: Mapping, results: Mapping[str, Mapping]) -> Iterator[tuple[str, str]]:
    sizes = {entry["parameters"][STUDENT] for entry in summary["benchmarks"].values() if STUDENT in entry["parameters"]}
    yield "parameters", _listed(f"{size:,}" for size in sorted(sizes)) or "not recorded"
    dtypes = sorted({found.get("efficiency", {}).get("dtype") or "" for found in results.values()} - {""})
    yield "precision of the evaluation", _listed(dtypes) or "not recorded"
    yield "seed", str(summary.get("seed", "not recorded"))
    if recipe.get("data_seed") is not None:
        yield "seed of the data", str(recipe["data_seed"])
    yield "longest sample", f"{recipe['max_length']} tokens" if recipe.get("max_length") else "not recorded"
    yield "begun", str(begun.get("date", "not recorded"))
    yield "ended", str(summary.get("ended", "not recorded"))
    yield "time of the run", seconds(summary.get("seconds", 0.0))
    versions = next((found["versions"] for found in results.values() if found.get("versions")), {})
    yield "versions", _listed(f"{name} {version}" for name, version in versions.items()) or "not recorded"
