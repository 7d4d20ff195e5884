"""Stages whose samples are taught answer by answer, since a tower's prompts do not hold earlier answers as they were given."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mmkd.data.lazy import is_lazy
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import FEW, stage_samples
from mmkd.teachers.teacher import Teacher
from mmkd.terms.spec import build_terms
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)


def with_answers_apart(recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher]) -> Recipe:
    """The recipe with `one_answer: true` in every stage that leaves it open and has samples that a tower cannot learn whole.

    Student, teachers and control then read the same samples. Pairs of preferences stay whole: only their last answers differ.
    """
    towers = {"student": student} | {name: teacher.body for name, teacher in teachers.items()}
    stages = {}
    for name, stage in recipe.stages.items():
        if stage.one_answer is None and not any(t.needs_pairs for t in build_terms(stage.terms)):
            looked_at = stage_samples(recipe, stage)
            if is_lazy(looked_at):  # too many to be looked at; templates treat one as another
                looked_at = looked_at[:: max(1, len(looked_at) // FEW)]
            samples = [sample for sample in looked_at if sample.answers > 1]
            needing = [role for role, tower in towers.items() if any(map(tower.preparer.answers_apart, samples))]
            if needing:
                stage = stage.model_copy(update={"one_answer": True})
                logger.info(
                    "stage %s: %d samples are taught answer by answer, since the prompts of %s do not hold earlier answers as "
                    "they were given; %d samples in all",
                    name, len(samples), " and ".join(needing), len(stage_samples(recipe, stage)),
                )  # fmt: skip
        stages[name] = stage
    return recipe.model_copy(update={"stages": stages})
