"""The SFT control: the same student put through the same stages, data, order, steps and seed, without the teacher."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mmkd
from mmkd.base.distributed import alone_in, is_main_process, wait_for_all
from mmkd.base.run_folder import take_control
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import data_state
from mmkd.runs.stages import train
from mmkd.terms.spec import TermSpec
from mmkd.towers.tower import Tower
from mmkd.train.experts import summarise_experts
from mmkd.train.spec import StageSpec

CONTROL_TERMS = {"cross_entropy": TermSpec(kind="cross_entropy")}


def control_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the SFT control: everything the same without the teacher.

    Its terms are the stage's `control_terms`, else those of the student that need no teacher, with cross-entropy in
    place of the others.
    """
    stages = {
        name: stage.model_copy(update={"terms": stage.control_terms or _without_teacher(stage), "control_terms": None})
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages, "teacher": None, "teachers": {}})


def _without_teacher(stage: StageSpec) -> dict[str, TermSpec]:
    kept = {name: spec for name, spec in stage.terms.items() if not spec.build(name).needs_teacher}
    learns = len(kept) == len(stage.terms) or any(spec.kind in CONTROL_TERMS for spec in kept.values())
    return kept if learns else kept | CONTROL_TERMS


def control_key(recipe: Recipe, student: Tower) -> str:
    """What defines a control: its untrained weights and processor, its stages with their data, seed and this version."""
    control = control_recipe(recipe)
    stages = control.model_dump(mode="json", include={"stages", "seed", "max_length"})
    data = [data_state(recipe, stage) for stage in control.stages.values()]
    facts = json.dumps([mmkd.__version__, student.fingerprint(), stages, data], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def train_control(recipe: Recipe, student: Tower, run: Path) -> Tower:
    """The SFT control, trained once for all runs beside this one that would train the very same."""
    shared = run.parent / "controls" / control_key(recipe, student)
    with alone_in(shared, "the SFT control of this one, too,", wait=True):
        control = train(control_recipe(recipe), "control", student, {}, shared)
    if is_main_process():
        take_control(shared, run)
        summarise_experts(run)
    wait_for_all()
    return control
