"""The day of a run, for chat templates that print the date: the same in every process, stage and resumed start."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping

from mmkd.recipes.recipe import Recipe
from mmkd.teachers.teacher import Teacher
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)


def with_day(recipe: Recipe, day: dt.date, student: Tower, teachers: Mapping[str, Teacher]) -> Recipe:
    """The recipe and its loaded towers with `day` for those whose template prints the date and that have no `date` of their own.

    A teacher out of a cache keeps the day on which that was written.
    """
    for name, teacher in teachers.items():
        if teacher.body.preparer.prints_day and not teacher.stored and recipe.teacher_specs[name].date is None:
            _set(name, teacher.body, day)
    if student.preparer.prints_day and recipe.student.date is None:
        _set("student", student, day)
        recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"date": day})})
    return recipe


def _set(role: str, tower: Tower, day: dt.date) -> None:
    logger.info("the chat template of the %s prints the date; in this run that is %s", role, day.isoformat())
    tower.preparer.day = day
