"""The training samples of a recipe's stages."""

from __future__ import annotations

import json
from functools import lru_cache

from mmkd.data.entries import read_samples
from mmkd.data.fingerprint import fingerprint, samples_fingerprint
from mmkd.data.preference import rejected_of
from mmkd.data.samples import Sample
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.recipes.recipe import Recipe
from mmkd.terms.spec import build_terms
from mmkd.train.spec import StageSpec


def stage_samples(recipe: Recipe, stage: StageSpec) -> list[Sample]:
    """All training samples of a stage, in the order of its data entries. Raises DataError."""
    samples = [sample for part in stage_parts(recipe, stage) for sample in part]
    if not samples:
        raise DataError("a stage has no samples")
    if any(t.needs_pairs for t in build_terms(stage.terms)):
        for sample in samples:
            rejected_of(sample)
    return samples


def stage_parts(recipe: Recipe, stage: StageSpec) -> tuple[tuple[Sample, ...], ...]:
    """The samples of each data entry of a stage. Raises DataError."""
    entries = tuple(spec.model_dump_json() for spec in stage.data)
    state = json.dumps([fingerprint(spec, recipe.data_root) for spec in stage.data])
    return _read_once(entries, recipe.seed, recipe.data_root, state, bool(stage.one_answer))


@lru_cache(maxsize=1)  # the control, the student and a check before them read the same data one after another
def _read_once(
    entries: tuple[str, ...], seed: int, data_root: str | None, state: str, one_answer: bool
) -> tuple[tuple[Sample, ...], ...]:
    specs = [DataSpec.model_validate_json(entry) for entry in entries]
    parts = tuple(tuple(read_samples(spec, seed, data_root)) for spec in specs)
    return tuple(tuple(one for sample in part for one in sample.by_answer()) for part in parts) if one_answer else parts


def data_state(recipe: Recipe, stage: StageSpec) -> list:
    """A stage's data by content: data that were changed make a new control, whatever lies beside them does not."""
    files = [fingerprint(spec, recipe.data_root) for spec in stage.data]
    return [*files, samples_fingerprint(stage_samples(recipe, stage))]


def files_of(recipe: Recipe) -> dict[str, dict[str, dict[str, str]]]:
    """By stage and data entry the annotation files with the hashes of their contents."""
    return {
        name: {str(number): fingerprint(spec, recipe.data_root)["files"] for number, spec in enumerate(stage.data)}
        for name, stage in recipe.stages.items()
    }


def all_samples(recipe: Recipe) -> dict[str, list[Sample]]:
    """The samples of every stage. Raises DataError for what is wrong with them."""
    samples = {name: stage_samples(recipe, stage) for name, stage in recipe.stages.items()}
    check_answers(samples)
    return samples


def check_answers(stages: dict[str, list[Sample]]) -> None:
    for name, samples in stages.items():
        empty = [s.id for s in samples if not s.answer.strip()]
        if empty:
            raise DataError(f"stage {name}: {len(empty)} samples have an empty answer, first: {', '.join(empty[:5])}")


def texts_of(samples: dict[str, list[Sample]]) -> list[str]:
    """What a student's own tokenizer is trained on."""
    return [turn.text for stage in samples.values() for sample in stage for turn in sample.turns]
