"""The write stages of a recipe: who answers, which data are asked about, and the recipe with what was written in its place."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.data.samples import Question, Sample
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError, MmkdError, did_you_mean
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.metric import metric_of, parser_of
from mmkd.recipes.recipe import Recipe
from mmkd.recipes.writes import after_training, sources
from mmkd.runs.data import all_samples, asked_entry, entry_samples, entry_state, texts_of
from mmkd.runs.teacher_answers import tower_of
from mmkd.runs.towers import build_student, load_teachers
from mmkd.runs.validation import validation_benchmarks
from mmkd.teachers.teacher import Teacher
from mmkd.towers.sampling import Sampling
from mmkd.towers.tower import Tower
from mmkd.writing.authors import Author, EndpointAuthor, LiveAuthor
from mmkd.writing.checks import Surroundings
from mmkd.writing.prompts import question_of
from mmkd.writing.rows import FACTS, ROWS
from mmkd.writing.spec import STUDENT, EndpointSpec, WriteSpec
from mmkd.writing.stage import WriteStage, prepare, write

logger = logging.getLogger(__name__)

FOLDER = "written"  # beside the runs, shared by all that would ask the same
TOLD = 20  # rows of another stage that a template knows


def with_written(
    recipe: Recipe, teachers: Mapping[str, Teacher], student: Tower | None, before: str | None = None,
    only: Sequence[str] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe with the rows of its write stages in the place of their names. What is written already is not asked again.

    student: as it is at this place.  before: the train stage that comes next; None before the first one, where all is
    written that does not need a student which was trained.  only: the names of stages. Raises DataError, TowerError.
    """
    order = list(recipe.stages)
    for name, spec in recipe.writes.items():
        late = after_training(recipe, name)
        due = not late if before is None else late and order.index(spec.before) <= order.index(before)
        if due and not _is_written(recipe, name) and (only is None or name in only):
            if missing := [other for other in sources(spec) if not _is_written(recipe, other)]:
                recipe = with_written(recipe, teachers, student, before, missing)
            folder = _empty_source(recipe, spec) or _write(recipe, name, teachers, student)
            logger.info("stage %s: its rows are in %s", name, folder)
            recipe = _resolved(recipe, name, folder)
    return recipe


def _write(recipe: Recipe, name: str, teachers: Mapping[str, Teacher], student: Tower | None) -> Path:
    stage = stage_of(recipe, name, teachers, student)
    if wrong := prepare(stage):
        raise DataError("; and ".join(f"stages.{name}.{error}" for error in wrong))
    return write(stage, Path(recipe.output).parent / FOLDER)


def _empty_source(recipe: Recipe, spec: WriteSpec) -> Path | None:
    """The rows of a stage all of whose data were written and came to nothing: none, as theirs."""
    folders = [None if entry.from_ is None else _folder(recipe, entry.from_) for entry in spec.data]
    empty = [folder for folder in folders if folder is not None and not facts_of(folder)["kept"]]
    return empty[0] if len(empty) == len(folders) else None


def facts_of(folder: Path) -> dict[str, Any]:
    """What became of a stage's answers."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def write_all(recipe: Recipe, only: Sequence[str] | None = None) -> dict[str, str]:
    """Writes what needs no student that was trained; by write stage the folder of its rows. Raises DataError, TowerError.

    only: names of stages, which bring those that they read.
    """
    if not recipe.writes:
        raise DataError("the recipe has no stage of `kind: write`")
    if unknown := [name for name in only or () if name not in recipe.writes]:
        raise DataError(f"there is no write stage {unknown[0]!r}; {did_you_mean(unknown[0], recipe.writes)}")
    if late := [name for name in only or () if after_training(recipe, name)]:
        raise DataError(f"stage {late[0]} asks a student that is not trained yet; `mmkd distill` writes it")
    teachers = load_teachers(recipe)
    student = build_student(recipe, teachers, texts_of(all_samples(recipe)))
    if found := write_findings(recipe, teachers, student):
        raise DataError("\n  ".join([f"{len(found)} things would stop this:", *found]) if len(found) > 1 else found[0])
    return with_written(recipe, teachers, student, only=only).written


def _is_written(recipe: Recipe, name: str) -> bool:
    return _folder(recipe, name) is not None


def _folder(recipe: Recipe, name: str) -> Path | None:
    """Where the rows of a stage are; None where they are not there yet."""
    found = recipe.written.get(name)
    return None if found is None else Path(found)


def _resolved(recipe: Recipe, name: str, folder: Path) -> Recipe:
    """The recipe with the folder of a write stage's rows in every data entry that reads them.

    Raises DataError where it has no row.
    """
    facts = facts_of(folder)
    readers = [key for key, stage in recipe.stages.items() if any(entry.from_ == name for entry in stage.data)]
    alone = [key for key in readers if all(entry.from_ == name for entry in recipe.stages[key].data)]
    if not facts["kept"] and readers and not alone:
        of, reader = facts["answers"], readers[0]
        logger.warning("stage %s kept none of %d answers; stage %s learns from its other data", name, of, reader)
    later = {other for names in (recipe.rounds.names[1:] if recipe.rounds else []) for other in names}
    if not facts["kept"] and alone and not set(alone) <= later:
        dropped = "; ".join(
            f"{check}: {count} {reason}" for check, counts in facts["dropped"].items() for reason, count in counts.items()
        )
        raise DataError(
            f"stage {name} kept none of {facts['answers']} answers, so stage {alone[0]} has nothing to learn from it "
            f"({dropped}); see {folder}/dropped.jsonl"
        )

    def entries(data: Sequence[DataSpec]) -> list[DataSpec]:
        own = [entry.model_copy(update={"root": str(folder)}) if entry.from_ == name else entry for entry in data]
        some = [entry for entry in own if entry.from_ != name or facts["kept"]]
        return some or own

    stages = {key: stage.model_copy(update={"data": entries(stage.data)}) for key, stage in recipe.stages.items()}
    writes = {key: spec.model_copy(update={"data": entries(spec.data)}) for key, spec in recipe.writes.items()}
    written = {**recipe.written, name: str(folder)}
    return recipe.model_copy(update={"stages": stages, "writes": writes, "written": written})


def nothing_new(recipe: Recipe, name: str) -> bool:
    """Whether all that a train stage would read of what its recipe writes came to nothing."""
    read = {entry.from_ for entry in recipe.stages[name].data} & recipe.written.keys()
    round_of = next((set(names) for names in (recipe.rounds.names if recipe.rounds else []) if name in names), set())
    own = [Path(folder) for other, folder in recipe.written.items() if other in round_of]
    return bool(own) and not any(facts_of(Path(recipe.written[other]))["kept"] for other in read & round_of)


def stage_of(recipe: Recipe, name: str, teachers: Mapping[str, Teacher], student: Tower | None) -> WriteStage:
    """A write stage with all it works with. Raises DataError, TowerError."""
    spec = recipe.writes[name]
    authors = [author_of(recipe, one, spec.sampling, spec.stop, teachers, student) for one in spec.by]
    once = Sampling(1, 0.0)
    judges = {key: partial(author_of, recipe, key, once, (), teachers, student) for key in recipe.teacher_specs}
    state = [entry_state(recipe, asked_entry(entry)) for entry in spec.data]
    context = {key: _context(_folder(recipe, other)) for key, other in spec.context.items()}
    return WriteStage(
        name,
        spec,
        partial(_samples, recipe, spec),
        authors,
        judges,
        surroundings(recipe, spec),
        context,
        [state, _tested(recipe)],
    )


def author_of(
    recipe: Recipe,
    by: str | EndpointSpec,
    how: Sampling,
    stop: Sequence[str],
    teachers: Mapping[str, Teacher],
    student: Tower | None,
) -> Author:
    """Who answers by this name. Raises DataError, TowerError."""
    if isinstance(by, EndpointSpec):
        return EndpointAuthor(by.called, by, how, stop)
    if by == STUDENT:
        if student is None:
            raise DataError("by: student: there is no student here")
        return LiveAuthor(STUDENT, student, str(recipe.student.model or "the student of the recipe"), how, stop)
    spec = recipe.teacher_specs[by]
    if spec.served is not None:
        model = spec.served_name or str(spec.model)
        served = EndpointSpec(endpoint=f"{spec.served.rstrip('/')}/v1", model=model, name=by, patience=spec.patience)
        return EndpointAuthor(by, served, how, stop)
    return LiveAuthor(by, tower_of(recipe, by, teachers[by]), str(spec.model), how, stop)


def _samples(recipe: Recipe, spec: WriteSpec) -> Iterator[Sample]:
    """What is asked about; of several data entries the ids say which."""
    for number, entry in enumerate(spec.data):
        for sample in entry_samples(recipe, asked_entry(entry)):
            yield sample if len(spec.data) == 1 else replace(sample, id=f"{number + 1}: {sample.id}")


def surroundings(recipe: Recipe, spec: WriteSpec) -> Surroundings:
    """What checks may use of the run."""
    tested: dict[str, Callable[[], Sequence[Question]]] = {
        name: partial(_questions, recipe, name) for name in recipe.evaluation.benchmarks
    }
    tested |= {one.name: partial(one.read, recipe.data_root) for one in validation_benchmarks(recipe)}
    return Surroundings(tested, partial(_questions, recipe), _scorer, spec.authors, tuple(recipe.teacher_specs))


def _questions(recipe: Recipe, name: str) -> Sequence[Question]:
    return load_benchmark(name).read(recipe.data_root)


def _tested(recipe: Recipe) -> list[str]:
    """What no row may overlap with."""
    return [*recipe.evaluation.benchmarks, *(one.name for one in validation_benchmarks(recipe))]


def _scorer(metric: str, parser: str) -> Callable[[str, Question], float | None]:
    scores, reads = metric_of(metric), parser_of(parser)

    def score(answer: str, question: Question) -> float | None:
        parsed = reads.parse(answer, question.choices)
        if question.choices and question.answer_index is not None:
            question = replace(question, references=(question.choices[question.answer_index],))
        elif not question.references:
            question = replace(question, references=(question.answer,))
        return None if parsed is None else float(scores.score(parsed, question))

    return score


def _context(folder: Path | None) -> dict[str, Any]:
    """What a template knows of another stage's rows: how many, some of them, and counts of their categories."""
    rows: list[dict[str, Any]] = []
    counts: dict[str, Counter[str]] = {}
    number = 0
    with (folder / ROWS).open(encoding="utf-8") as stream:  # type: ignore[operator]
        for number, line in enumerate(stream, start=1):  # noqa: B007
            row = json.loads(line)
            if len(rows) < TOLD:
                rows.append({key: row[key] for key in ("question", "answer", "choices", "categories", "told") if key in row})
            for key, value in row.get("categories", {}).items():
                counts.setdefault(key, Counter())[value] += 1
    ranked = {key: [{"value": value, "count": count} for value, count in found.most_common()] for key, found in counts.items()}
    return {"number": number, "rows": rows, "counts": ranked}


# ---- before anything is asked ----------------------------------------------------------------------------------------


def write_findings(recipe: Recipe, teachers: Mapping[str, Teacher], student: Tower) -> list[str]:
    """What would stop the write stages of a recipe, all of it, before any question is asked."""
    found = []
    for name, spec in recipe.writes.items():
        if _is_written(recipe, name):
            continue
        try:
            if all(_is_written(recipe, other) for other in sources(spec)):
                found += [f"stages.{name}.{error}" for error in prepare(stage_of(recipe, name, teachers, student))]
            else:
                found += [f"stages.{name}.{error}" for error in _early(recipe, spec)]
        except MmkdError as error:
            found.append(f"stages.{name}: {error}")
    return found


def _early(recipe: Recipe, spec: WriteSpec) -> list[str]:
    """What can be said of a stage whose data are not there yet: of its checks."""
    found, around = [], surroundings(recipe, spec)
    for check in spec.all_checks():
        try:
            check.made().prepare(around)
        except DataError as error:
            found.append(f"checks.{check.kind}: {error}")
    return found


def write_lines(recipe: Recipe) -> list[str]:
    """The plan of the write stages, for people."""
    lines = []
    for name, spec in recipe.writes.items():
        count = sum(len(entry_samples(recipe, asked_entry(entry))) for entry in spec.data)
        of = {"question": "samples", "picture": "samples, once a picture", "region": "samples, each region"}[spec.per]
        several = f" x {spec.samples}" if spec.samples > 1 else ""
        lines += [
            "",
            f"stage {name} writes: {' and '.join(spec.authors)} answer {count:,} {of}{several}, before stage {spec.before}",
        ]
        lines.append(
            f"  prompt {spec.card.name}, form {spec.card.form.kind}, checks {', '.join(c.kind for c in spec.all_checks())}"
        )
        first = next(iter(itertools.islice(_samples(recipe, spec), 1)), None)
        if first is not None and not any(entry.from_ for entry in spec.data):
            lines.append(f"  the first is about {question_of(first).question[:100]!r}")
    return lines
