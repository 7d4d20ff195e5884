"""Ablations: methods x data x seeds, each run from the same start with the same data, steps and order; then one table.

A grid is a YAML file of `kind: ablation`, run by `mmkd distill`. Finished runs are kept, a stopped grid goes on where it
stopped, and the same command started several times (one a GPU) shares the runs out.
"""

from __future__ import annotations

import json
import logging
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from pydantic import Field, model_validator

from mmkd.base.distributed import claimed, is_main_process, world_size
from mmkd.base.files import write_whole
from mmkd.base.jsonl import read_object
from mmkd.base.schema import Strict
from mmkd.errors import RecipeError
from mmkd.evaluation.results import read_results
from mmkd.recipes.reading import found_recipe, read_raw, validate, with_found_paths
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import role_of
from mmkd.runs.run import distill, evaluate_all
from mmkd.runs.seeds import spread
from mmkd.runs.towers import load_teachers

logger = logging.getLogger(__name__)


_LENGTHS = {"steps", "epochs"}
NLL_COLUMNS = {"nll": "NLL", "nll_lead": "NLL over the reference"}
OWN_LEADS = {"student_minus_best_control": "over its best control", "student_minus_hard_answers": "over hard answers"}


class MethodSpec(Strict):
    """Stages of one method. Each starts as a copy of the recipe's last stage; the keys given here replace its keys. Write stages
    (`kind: write`) stand as they are given."""

    # Beside a stage's own keys: share, of the method's steps. One that gives steps or epochs of its own has no share in them.
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    steps: int | None = Field(None, gt=0, le=10**9)  # in place of the recipe's
    controls: Any = False  # what the method is held against beside the reference, as `controls` of a recipe

    @model_validator(mode="after")
    def shares_add_up(self) -> MethodSpec:
        stages = _trained(self.stages)
        both = [name for name, stage in stages.items() if "share" in stage and _LENGTHS & stage.keys()]
        if both:
            raise ValueError(f"stage {both[0]}: give either `share` or a length of its own ({', '.join(sorted(_LENGTHS))})")
        shares = [stage.get("share", 1.0) for stage in stages.values() if not _LENGTHS & stage.keys()]
        if not shares:
            if self.steps is not None:
                raise ValueError(f"steps is {self.steps}, but every stage has a length of its own; give one of the two")
            return self
        if not all(isinstance(share, int | float) and share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            of = [name for name, stage in stages.items() if not _LENGTHS & stage.keys()]
            given = ", ".join(f"{name} {share}" for name, share in zip(of, shares, strict=True))
            raise ValueError(
                f"the shares of the steps do not add up to 1: {given}; every method gets the recipe's steps, or those "
                "that it gives in `steps`"
            )
        return self


def _trained(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: stage for name, stage in stages.items() if stage.get("kind") != "write"}


class DataEntry(Strict):
    recipe: str  # a recipe's path, seen from the grid's folder
    overrides: list[str] = Field([])  # key=value, as on the command line


class Grid(Strict):
    """kind: ablation."""

    kind: Literal["ablation"]
    title: str
    output: str
    seeds: list[int] = Field(min_length=1)
    reference: str  # the method that the others are compared with
    data: dict[str, DataEntry | None]  # null drops what an extended grid has
    methods: dict[str, MethodSpec | None]

    @model_validator(mode="after")
    def complete(self) -> Grid:
        self.data = {name: entry for name, entry in self.data.items() if entry is not None}
        self.methods = {name: entry for name, entry in self.methods.items() if entry is not None}
        if not self.data:
            raise ValueError("data: nothing is left; name at least one recipe")
        if self.reference not in self.methods:
            raise ValueError(f"reference {self.reference!r} is none of the methods {', '.join(self.methods)}")
        return self


@dataclass(frozen=True)
class Run:
    data: str
    method: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output)

    @property
    def name(self) -> str:
        return f"{self.data}, {self.method}, seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        path = self.folder / "summary.json"
        return read_object(path) if path.exists() else None


def load_grid(path: str | Path, overrides: list[str]) -> tuple[Grid, list[Run]]:
    """The grid and its runs, all validated; seed by seed, so that a grid stopped early has whole seeds. Raises RecipeError."""
    path = found_recipe(path)
    grid = validate(read_raw(path, overrides), str(path), Grid)
    recipes, problems = {}, []
    for data, entry in grid.data.items():
        for method, spec in grid.methods.items():
            where = f"{path}: {method} on {data}"
            try:
                place = Path(path).parent / entry.recipe
                raw = _method_recipe(read_raw(place, entry.overrides), spec, where)
                recipes[data, method] = validate(with_found_paths(raw, place), where, Recipe)
            except RecipeError as error:
                problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return grid, [
        Run(data, method, seed, recipe.model_copy(update={
            "title": f"{method} on {data}", "seed": seed,
            "output": str(Path(grid.output) / data / method / f"seed_{seed}"),
        }))
        for seed in grid.seeds for (data, method), recipe in recipes.items()
    ]  # fmt: skip


def _method_recipe(raw: dict[str, Any], spec: MethodSpec, where: str) -> dict[str, Any]:
    stages = raw.get("stages")
    if not isinstance(stages, dict) or not stages or not isinstance(last := [*stages.values()][-1], dict):
        raise RecipeError(f"{where}: the recipe has no stages to copy")
    made = {}
    whole = {"steps": spec.steps} if spec.steps is not None else {key: last[key] for key in _LENGTHS & last.keys()}
    trained = _trained(spec.stages)
    for name, given in spec.stages.items():
        if name not in trained:
            made[name] = given
            continue
        given = dict(given)
        share = given.pop("share", 1.0)
        length = {key: given[key] for key in _LENGTHS & given.keys()} or {key: share * n for key, n in whole.items()}
        stage = {**{key: value for key, value in last.items() if key not in _LENGTHS}, **given, **length}
        if isinstance(steps := stage.get("steps"), float):
            stage["steps"] = round(steps)
        made[name] = stage
    others = {key: value for key, value in raw.items() if key not in ("control", "controls")}
    return {**others, "stages": made, "controls": spec.controls}


# ---- running ---------------------------------------------------------------------------------------------------------


def ablate(grid: Grid, runs: list[Run], name: str = "ablation") -> dict[str, Any]:
    """Runs what is not done yet and is not being done by another process; writes `name`.{json,md,svg} to the output.

    Grids with the same output share the runs that they have in common. Returns what `collect` does. Raises what `distill` raises.
    """
    for number, run in enumerate(runs, 1):
        with _claimed(run.folder) as mine:
            if mine and run.summary is None:
                logger.info("run %d of %d: %s", number, len(runs), run.name)
                controls = [role_of(name, control.kind) for name, control in run.recipe.controls.items()]
                distill(run.recipe, scored=("student", *controls))
    for data in grid.data:
        _score_teacher(Path(grid.output) / data, next(run.recipe for run in runs if run.data == data))
    result = collect(grid, runs)
    if not is_main_process():
        return result
    folder = Path(grid.output)
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_whole(folder / f"{name}.md", ablation_table(result) + "\n")
    write_whole(folder / f"{name}.svg", ablation_plot(result))
    return result


def _claimed(folder: Path) -> AbstractContextManager[bool]:
    """Whether this process may work on a run; the processes of one launch work on it together."""
    return nullcontext(True) if world_size() > 1 else claimed(folder.with_suffix(".lock"))


def _score_teacher(folder: Path, recipe: Recipe) -> None:
    with _claimed(folder / "teacher") as mine:
        teachers = load_teachers(recipe) if mine and recipe.evaluation.benchmarks else {}
        towers = {name: teacher.running() for name, teacher in teachers.items() if not teacher.stored}
        if towers:
            evaluate_all(recipe, folder, towers)


# ---- results ---------------------------------------------------------------------------------------------------------


def collect(grid: Grid, runs: list[Run]) -> dict[str, Any]:
    """{title, reference, missing, data: {name: {teacher, benchmarks, methods: {method: {benchmark or "mean": figures}}}}}

    Figures: the score's mean and values over the finished seeds with the 95 % interval of Student's t, and the same of
    the lead over the reference, paired by seed. Scores are 0..1; "mean" is the mean of the benchmarks.
    """
    summaries = {(run.data, run.method, run.seed): run.summary for run in runs}
    result: dict[str, Any] = {
        "title": grid.title, "seeds": grid.seeds, "reference": grid.reference,
        "missing": [run.name for run in runs if summaries[run.data, run.method, run.seed] is None], "data": {},
    }  # fmt: skip
    for data in grid.data:
        found = {
            method: {seed: s for seed in grid.seeds if (s := summaries[data, method, seed]) is not None}
            for method in grid.methods
        }
        done = [summary for seeds in found.values() for summary in seeds.values()]
        if not done:
            continue
        benchmarks = list(done[0]["benchmarks"])
        result["data"][data] = {
            "benchmarks": {name: done[0]["benchmarks"][name]["n"] for name in benchmarks},
            "teacher": _teacher_scores(Path(grid.output) / data, benchmarks),
            "methods": {
                method: _figures(seeds, found[grid.reference], benchmarks) for method, seeds in found.items() if seeds
            },
        }
    return result


def _teacher_scores(folder: Path, benchmarks: list[str]) -> dict[str, float]:
    scores = {}
    for name in benchmarks:
        path = folder / "evaluation" / "teacher" / name / "results.json"
        if path.exists():
            scores[name] = read_results(path)["score"]
    return scores | ({"mean": statistics.mean(scores.values())} if len(scores) == len(benchmarks) else {})


def _figures(seeds: dict[int, dict], reference: dict[int, dict], benchmarks: list[str]) -> dict[str, Any]:
    first = next(iter(seeds.values()))["benchmarks"][benchmarks[0]]
    figures: dict[str, Any] = {
        "seeds": list(seeds),
        "parameters": first["parameters"]["student"],
        "parameters_active": first["parameters_active"]["student"],
        "seconds": statistics.median(summary["seconds"] for summary in seeds.values()),
    }
    for name in [*benchmarks, "mean"]:
        scores = {seed: _score(summary, name) for seed, summary in seeds.items()}
        paired = [scores[seed] - _score(reference[seed], name) for seed in seeds if seed in reference]
        figures[name] = {"score": spread([*scores.values()]), "lead": spread(paired) if paired else None}
        doubt = {seed: _nll(summary, name) for seed, summary in seeds.items()}
        if None not in doubt.values():
            figures[name]["nll"] = spread([*doubt.values()])
            known = {seed: value for seed in seeds if seed in reference and (value := _nll(reference[seed], name)) is not None}
            if known:
                figures[name]["nll_lead"] = spread([doubt[seed] - value for seed, value in known.items()])
        for lead in OWN_LEADS:
            values = [_lead(summary, name, lead) for summary in seeds.values()]
            if None not in values:
                figures[name][lead] = spread(values)
    return figures


def _nll(summary: dict[str, Any], benchmark: str) -> float | None:
    """The student's negative log-likelihood on one benchmark or its mean over all; None where it is not known."""
    entries = summary["benchmarks"]
    of = entries.values() if benchmark == "mean" else [entries[benchmark]]
    found = [entry.get("calibration", {}).get("student") for entry in of]
    return None if None in found else statistics.mean(one["nll"]["value"] for one in found)


def _lead(summary: dict[str, Any], benchmark: str, lead: str) -> float | None:
    """The student's lead over its own controls of one seed, on one benchmark or on their mean; None without such a control."""
    entries = summary["benchmarks"]
    found = [e.get(lead) for e in (entries.values() if benchmark == "mean" else [entries[benchmark]])]
    return None if None in found else statistics.mean(one["mean"] for one in found)


def _score(summary: dict[str, Any], benchmark: str) -> float:
    entries = summary["benchmarks"]
    return statistics.mean(e["student"] for e in entries.values()) if benchmark == "mean" else entries[benchmark]["student"]


def ablation_table(result: dict[str, Any]) -> str:
    """The results in Markdown: a table for each data set."""
    lines = []
    for data, found in result["data"].items():
        columns = [*found["benchmarks"], *(["mean"] if len(found["benchmarks"]) > 1 else [])]
        names = [f"`{name}` ({found['benchmarks'][name]:,})" if name in found["benchmarks"] else name for name in columns]
        own = {lead: words for lead, words in OWN_LEADS.items() if any(lead in f[columns[-1]] for f in found["methods"].values())}
        doubt = [words for key, words in NLL_COLUMNS.items() if any(key in f[columns[-1]] for f in found["methods"].values())]
        leads = " | ".join([f"lead over {result['reference']}", *own.values(), *doubt])
        lines += [f"### {data}", "", f"| method | {' | '.join(names)} | {leads} | seeds | parameters |"]
        lines.append("|---" * (len(columns) + len(own) + len(doubt) + 4) + "|")
        if found["teacher"]:
            teacher = " | ".join(f"{100 * found['teacher'][name]:.1f}" for name in columns)
            lines.append(f"| teacher | {teacher} |{' |' * (len(own) + len(doubt) + 3)}")
        for method, figures in found["methods"].items():
            cells = [_cell(figures[name]["score"]) for name in columns]
            over = ["" if method == result["reference"] else _cell(figures[columns[-1]]["lead"], "+")]
            over += [_cell(figures[columns[-1]].get(lead), "+") for lead in own]
            over += [_nats(figures[columns[-1]].get(key), "+" * ("lead" in key)) for key in NLL_COLUMNS if doubt]
            active = figures["parameters_active"]
            size = f"{figures['parameters']:,}" + (f" ({active:,} active)" if active < figures["parameters"] else "")
            lines.append(f"| {method} | {' | '.join(cells)} | {' | '.join(over)} | {len(figures['seeds'])} | {size} |")
        lines.append("")
    if result["missing"]:
        lines.append(f"{len(result['missing'])} runs are not finished, first: {'; '.join(result['missing'][:3])}")
    return "\n".join(lines).rstrip()


def _cell(figures: dict[str, Any] | None, sign: str = "") -> str:
    if figures is None:
        return ""
    text = f"{100 * figures['mean']:{sign}.1f}"
    if "ci95" in figures:
        text += " [" + ", ".join(f"{100 * bound:{sign}.1f}" for bound in figures["ci95"]) + "]"
    return text


def _nats(figures: dict[str, Any] | None, sign: str = "") -> str:
    if figures is None:
        return ""
    text = f"{figures['mean']:{sign}.3f}"
    return text + (f" [{figures['ci95'][0]:{sign}.3f}, {figures['ci95'][1]:{sign}.3f}]" if "ci95" in figures else "")


# ---- plot ------------------------------------------------------------------------------------------------------------

WIDTH, ROW, LABELS, MARGIN = 760, 26, 190, 24


def ablation_plot(result: dict[str, Any]) -> str:
    """Leads over the reference with their intervals as SVG: a panel for each data set, a row for each method."""
    panels, top = [], MARGIN
    for data, found in result["data"].items():
        column = "mean" if len(found["benchmarks"]) > 1 else next(iter(found["benchmarks"]))
        leads = {
            method: figures[column]["lead"] for method, figures in found["methods"].items()
            if method != result["reference"] and figures[column]["lead"] is not None
        }
        if leads:
            panels.append(_panel(f"{data}: {' and '.join(found['benchmarks'])}", leads, top))
            top += panels[-1]["height"] + MARGIN
    template = Environment(loader=PackageLoader("mmkd.runs", "."), autoescape=True).get_template("ablation.svg.j2")
    sizes = {"width": WIDTH, "height": top, "labels": LABELS}
    return template.render(**sizes, panels=panels, reference=result["reference"], title=result["title"])


def _panel(title: str, leads: dict[str, dict], top: int) -> dict[str, Any]:
    points = [0.0] + [100 * v for lead in leads.values() for v in (*lead["values"], *lead.get("ci95", ()))]
    low, high = min(points), max(points)
    pad = 0.06 * (high - low or 1.0)
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(LABELS + (value - low) / (high - low) * (WIDTH - LABELS - MARGIN), 1)

    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 10)
    first = int(-(-low // step))
    rows = [
        {
            "method": method, "y": top + 34 + ROW * number, "text": f"{100 * lead['mean']:+.1f}", "x": x(100 * lead["mean"]),
            "dots": [x(100 * v) for v in lead["values"]], "ci": [x(100 * bound) for bound in lead.get("ci95", ())],
        }
        for number, (method, lead) in enumerate(leads.items())
    ]  # fmt: skip
    height = 34 + ROW * len(rows) + 10
    ticks = [(x(k * step), f"{k * step:+g}") for k in range(first, int(high // step) + 1)]
    return {"title": title, "top": top, "height": height, "rows": rows, "ticks": ticks, "zero": x(0.0)}
