"""What is checked before anything is trained: the same for dry run, estimate, cache and run. All findings at once."""

from __future__ import annotations

from collections.abc import Mapping

from mmkd.base.distributed import world_size
from mmkd.errors import DataError, MmkdError, TowerError, one_line
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_parts
from mmkd.runs.room import room_errors
from mmkd.teachers.teacher import Teacher
from mmkd.terms.spec import build_terms
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.experts import sparse_blocks
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import sparse_config
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import term_errors
from mmkd.train.preference import PreferenceDataset
from mmkd.train.spec import StageSpec
from mmkd.train.streaming import stage_stream
from mmkd.train.trainable import lora_errors
from mmkd.train.trainer import split_evenly

SHOWN = 16  # findings that a message lists
TRIED = 3  # samples of a data entry that are prepared


def preflight(
    recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher], processes: int | None = None, *, writes: bool = True
) -> None:
    """Checks every stage against the student as it is before the first one. Raises DataError with all findings.

    processes: that train together; None for those that were started together.  writes: whether the output folder is asked, too.

    Terms against towers and teachers, tokenizers, some samples of every data entry prepared by student and teachers, batch
    sizes, experts, adapters, the output folder and the room on its disk.
    """
    found = fit_errors(recipe, student, teachers, world_size() if processes is None else processes)
    found += room_errors(recipe, student) if writes else []
    if not found:  # towers that do not fit would fail on every sample, too
        found = [error for name in recipe.stages for error in _data_errors(recipe, name, student, teachers)]
    if len(found) == 1:
        raise DataError(found[0])
    if found:
        shown = [one_line(error, 1000) for error in found[:SHOWN]]
        shown += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise DataError(f"{len(found)} things would stop this run:\n  " + "\n  ".join(shown))


def fit_errors(recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher], processes: int = 1) -> list[str]:
    """What does not fit between the stages, the student and the teachers, whatever the data are."""
    found: list[str] = []
    sparse = bool(sparse_blocks(student))
    for name, stage in recipe.stages.items():
        wrong = _upcycle_errors(stage, student, sparse)
        sparse = sparse or stage.upcycle is not None
        wrong += [f"lora.{error}" for error in lora_errors(student, stage.lora)] if stage.lora else []
        terms, needed = _terms_of(stage, teachers)
        wrong += [f"terms.{error}" for error in term_errors(student, needed, terms, sparse=sparse)]
        wrong += [f"optimiser: {error}" for error in split_evenly(stage.optimiser, processes)]
        found += [f"stages.{name}.{error}" for error in wrong]
    return found


def _terms_of(stage: StageSpec, teachers: Mapping[str, Teacher]) -> tuple[list[Term], dict[str, Teacher]]:
    """The terms of a stage and the teachers that they read in each step."""
    terms = build_terms(stage.terms)
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


def _data_errors(recipe: Recipe, name: str, student: Tower, teachers: Mapping[str, Teacher]) -> list[str]:
    stage, wrong = recipe.stages[name], []
    terms, needed = _terms_of(stage, teachers)
    try:
        streamed = stage_stream(stage, recipe.seed, recipe.data_root) is not None
        parts = stage_parts(recipe, stage)
    except MmkdError as error:
        return [f"stages.{name}.data: {error}"]
    for entry, samples in zip(stage.data, parts, strict=True):
        wrong += _sample_errors(entry.card or entry.format, samples, student, needed, terms)
    count, batch = sum(map(len, parts)), stage.optimiser.batch_size
    if not streamed and count < batch:
        wrong.append(f"optimiser: {count} samples, fewer than batch_size {batch}")
    return [f"stages.{name}.{error}" for error in wrong]


def _sample_errors(name: str, samples: tuple, student: Tower, teachers: Mapping[str, Teacher], terms: list) -> list[str]:
    """Errors of preparing some samples of a data entry; a picture that cannot be read is none here."""
    step = max(1, len(samples) // TRIED)
    some = list(samples[::step][:TRIED])
    of_pairs = any(t.needs_pairs for t in terms)
    try:
        dataset = (PreferenceDataset if of_pairs else PairDataset)(some, student, teachers, terms, max_skipped=len(some))
        for index in range(len(some)):
            dataset[index]
    except MmkdError as error:
        return [f"data ({name}): {error}"]
    return []
