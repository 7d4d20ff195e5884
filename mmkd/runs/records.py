"""What a run's summary records beside its scores: the day of its end, samples by data entry, which models are the hub's."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.evaluation.model_card import HUB_ID
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import samples_by_entry


def records(recipe: Recipe, benchmarks: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """{"ended": day, "samples": {stage: [count]}, "hub": {role: [id]}}.

    before: the summary that is there; where it has the same scores, the run ended when that says.
    """
    ended = before.get("ended") if before.get("benchmarks") == benchmarks else None
    found = {"ended": ended or dt.date.today().isoformat(), "samples": samples_by_entry(recipe)}
    return found | ({"hub": hub} if (hub := hub_ids(recipe)) else {})


def hub_ids(recipe: Recipe) -> dict[str, list[str]]:
    """By role the models, or their parts, that are no folder here; roles without are left out."""
    named = {name: [spec.model] for name, spec in recipe.teacher_specs.items()}
    student = recipe.student
    parts = [student.assemble.vision.source, student.assemble.language.source] if student.assemble else [student.model]
    named["student"] = list(dict.fromkeys(parts))
    plain = {role: [name.removeprefix("hf-hub:") for name in names if name] for role, names in named.items()}
    found = {role: [name for name in names if _is_hub_id(name)] for role, names in plain.items()}
    return {role: names for role, names in found.items() if names}


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()
