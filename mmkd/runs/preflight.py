"""What is checked before anything is trained: the same for dry run, estimate, cache and run. All findings at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mmkd.base.distributed import world_size
from mmkd.data.lazy import joined
from mmkd.data.samples import Sample
from mmkd.errors import DataError, MmkdError, TowerError, one_line
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_errors
from mmkd.runs.data import entry_samples, is_unwritten, stage_parts
from mmkd.runs.room import room_errors
from mmkd.runs.survey import LOOKED_AT, Survey, look, unseen
from mmkd.runs.writes import write_findings
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.experts import sparse_blocks
from mmkd.towers.quantise import FORMATS, divisible
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import sparse_config
from mmkd.train.distiller import term_errors
from mmkd.train.guards import blind_error
from mmkd.train.monitor import distances, never_trained_on
from mmkd.train.rollouts import stored_error
from mmkd.train.skips import allowance
from mmkd.train.spec import StageSpec
from mmkd.train.streaming import stage_stream
from mmkd.train.trainable import lora_errors
from mmkd.train.trainer import split_evenly

SHOWN = 16  # findings that a message lists
SOME = 4  # samples whose pictures are exchanged

logger = logging.getLogger(__name__)


def preflight(
    recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher], processes: int | None = None, *, writes: bool = True,
    most: int = LOOKED_AT,
) -> dict[str, list[Survey]]:  # fmt: skip
    """Checks every stage against the student as it is before the first one. Raises DataError with all findings.

    Returns by stage what was found in each of its data entries: lengths, and samples that will be left out.

    processes: that train together; None for those that were started together.  writes: whether the output folder is asked, too.
    most: samples of a data entry that are prepared.

    Terms against towers and teachers, tokenizers, samples of every data entry prepared by student and teachers, pictures that
    are not there or that do not reach a tower, batch sizes, experts, adapters, the output folder and the room on its disk.
    """
    found = fit_errors(recipe, student, teachers, world_size() if processes is None else processes)
    found += control_errors(recipe)
    found += write_findings(recipe, teachers, student)
    found += room_errors(recipe, student) if writes else []
    surveys: dict[str, list[Survey]] = {}
    if not found:  # towers that do not fit would fail on every sample, too
        known: dict[str, Survey] = {}
        found = [error for name in recipe.stages for error in _data_errors(recipe, name, student, teachers, surveys, known, most)]
    if len(found) == 1:
        raise DataError(found[0])
    if found:
        shown = [one_line(error, 1000) for error in found[:SHOWN]]
        shown += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise DataError(f"{len(found)} things would stop this run:\n  " + "\n  ".join(shown))
    for name, entries in surveys.items():
        for problem in (problem for survey in entries for problem in survey.problems()):
            logger.warning("stage %s: %s", name, problem)
    return surveys


def fit_errors(recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher], processes: int = 1) -> list[str]:
    """What does not fit between the stages, the student and the teachers, whatever the data are."""
    found: list[str] = []
    sparse = bool(sparse_blocks(student))
    for name, stage in recipe.stages.items():
        wrong = _upcycle_errors(stage, student, sparse)
        sparse = sparse or stage.upcycle is not None
        wrong += _quantise_errors(stage, student)
        wrong += [f"lora.{error}" for error in lora_errors(student, stage.lora)] if stage.lora else []
        terms, needed = terms_of(stage, teachers)
        wrong += [f"terms.{error}" for error in term_errors(student, needed, terms, sparse=sparse)]
        wrong += [f"answers: {e}" for t in needed.values() if stage.generates and (e := stored_error(t))]
        wrong += [f"optimiser: {error}" for error in split_evenly(stage.optimiser, processes)]
        wrong += _monitor_errors(stage, student, teachers, needed)
        found += [f"stages.{name}.{error}" for error in wrong]
    return found


def _monitor_errors(
    stage: StageSpec, student: Tower, teachers: Mapping[str, Teacher], needed: Mapping[str, Teacher]
) -> list[str]:
    """What makes the distances impossible that the stage measures on held-out prompts."""
    if stage.monitor is None:
        return []
    found = {**needed} | {name: teacher for name, teacher in teachers.items() if name == stage.monitor.oracle}
    return [f"monitor.proxy: {error}" for error in term_errors(student, found, distances(stage.monitor, needed))]


def terms_of(stage: StageSpec, teachers: Mapping[str, Teacher]) -> tuple[list[Term], dict[str, Teacher]]:
    """The terms of a stage and the teachers that they read in each step."""
    terms = stage.build_terms()
    return terms, {name: teacher for name, teacher in teachers.items() if terms_of_teacher(terms, name, teachers)}


def _upcycle_errors(stage: StageSpec, student: Tower, sparse: bool) -> list[str]:
    if stage.upcycle is None:
        return []
    if sparse:
        return ["upcycle: the student has experts already; take this key out"]
    try:
        sparse_config(student.model.config.get_text_config(), **stage.upcycle.model_dump())
    except TowerError as error:
        return [f"upcycle: {error}"]
    return []


def _quantise_errors(stage: StageSpec, student: Tower) -> list[str]:
    if stage.quantise is None:
        return []
    name, parts = stage.quantise.format, stage.quantise.parts
    fits, left = divisible(student, name, parts)
    if fits:
        return []
    columns = FORMATS[name].columns
    why = f"{columns} does not divide the rows of {left[0]} and {len(left) - 1} more" if left else "they have none"
    return [f"quantise: no matrix of {' and '.join(parts)} can be {name}: {why}; take nf4, or other parts"]


def _data_errors(
    recipe: Recipe, name: str, student: Tower, teachers: Mapping[str, Teacher], surveys: dict[str, list[Survey]],
    known: dict[str, Survey], most: int,
) -> list[str]:  # fmt: skip
    """surveys: gets what is found in the stage's data.  known: what was found in each data entry, in any stage."""
    stage = recipe.stages[name]
    terms, needed = terms_of(stage, teachers)
    try:
        streamed = stage_stream(stage, recipe.seed, recipe.data_root) is not None
        parts = stage_parts(recipe, stage)
    except MmkdError as error:
        return [f"stages.{name}.data: {error}"]
    try:
        held_out = [sample for entry in (stage.monitor.data if stage.monitor else ()) for sample in entry_samples(recipe, entry)]
        if held_out:
            never_trained_on(held_out, joined(parts))
    except MmkdError as error:
        return [f"stages.{name}.monitor: {error}"]
    entries = surveys[name] = []
    for entry, samples in zip(stage.data, parts, strict=True):
        key = entry.model_dump_json()
        if is_unwritten(entry) and any(teacher.stored for teacher in needed.values()):
            entries.append(unseen(entry, samples))  # no cache has what is not written yet
            continue
        entries.append(look(entry, samples, student, needed, terms, known.get(key), most))
        known.setdefault(key, entries[-1])
    wrong = _left_out_errors(recipe, entries)
    if recipe.guards.pixels_matter and name == next(iter(recipe.stages)):
        towers = {"student": student, **{n: t.tower for n, t in needed.items() if t.tower is not None and not t.stored}}
        wrong += [error for role, tower in towers.items() if (error := blind_error(role, tower, _pictured(parts))) is not None]
    count, batch = sum(map(len, parts)), stage.optimiser.batch_size
    if not streamed and count < batch:
        wrong.append(f"optimiser: {count} samples, fewer than batch_size {batch}")
    return [f"stages.{name}.{error}" for error in wrong]


def _pictured(parts: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Some samples with pictures, spread over those of a stage."""
    found = []
    for part in parts:
        step = max(1, len(part) // SOME)
        found += [sample for place in range(0, len(part), step) if (sample := part[place]).images]
    return found[:: max(1, len(found) // SOME)][:SOME]


def _left_out_errors(recipe: Recipe, entries: Sequence[Survey]) -> list[str]:
    """Errors of preparing the samples of a stage, and what it would leave out, where that is more than is allowed."""
    wrong = [f"data ({survey.name}): {survey.error}" for survey in entries if survey.error]
    useless = [survey for survey in entries if survey.tried and len(survey.skips) == survey.tried]
    share, of = recipe.guards.max_skipped, sum(survey.samples for survey in entries)
    left_out, allowed = sum(survey.left_out for survey in entries), allowance(share, of)
    if sum(survey.surely_left_out for survey in entries) > allowed:
        whole = all(survey.tried == survey.samples for survey in entries)
        found = "; ".join(f"{survey.name}: {problem}" for survey in entries for problem in survey.problems())
        wrong.append(
            f"data: {'' if whole else 'about '}{round(left_out):,} of {of:,} samples cannot be used, more than the {allowed:,} "
            f"that guards.max_skipped ({share:g}) allows. {found}"
        )
    else:
        wrong += [f"data ({survey.name}): {'; '.join(survey.problems())}" for survey in useless]
    return wrong
