"""The control `tuned`: the best of a few rates, label smoothings and label choices, chosen on the validation split."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mmkd.data.fingerprint import samples_fingerprint
from mmkd.errors import DataError
from mmkd.recipes.controls import TuningSpec
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.terms.spec import TermSpec
from mmkd.towers.tower import Tower
from mmkd.train.spec import StageSpec

logger = logging.getLogger(__name__)

Values = dict[str, Any]  # {"rate", "label_smoothing", "target"}


Learn = Callable[[Recipe], tuple[Tower, dict[str, Any]]]


def tuned(
    own: Recipe, tries: TuningSpec, learn: Learn, score: Callable[[Recipe, Tower], float]
) -> tuple[Recipe, dict[str, Any]]:
    """The control's recipe with the values that score best, and all that were tried: {"chosen", "tried"}.

    One value after another, each with the best of those before; of equal scores the first. learn: trains a recipe, or finds that
    it was trained. score: of a model on the validation split.
    """
    best: Values = {"rate": tries.rates[0], "label_smoothing": tries.label_smoothing[0], "target": tries.targets[0]}
    tried: list[Values] = []
    seen: dict[str, Any] = {}

    def scored(values: Values) -> float:
        recipe = with_values(own, values)
        key = _what_is_learnt(recipe)
        if key not in seen:
            tower, facts = learn(recipe)
            seen[key] = score(recipe, tower)
            tried.append(values | {"validation": seen[key], "seconds": facts["seconds"]})
            logger.info("tuned control: %s scores %.2f %% on the validation split", _in_words(values), 100 * seen[key])
        return seen[key]

    for name, values in (("rate", tries.rates), ("label_smoothing", tries.label_smoothing), ("target", tries.targets)):
        best = max(({**best, name: value} for value in values), key=scored)
    logger.info("tuned control: takes %s", _in_words(best))
    return with_values(own, best), {"chosen": best, "tried": tried}


def with_values(own: Recipe, values: Values) -> Recipe:
    """A control's recipe with other rates, label smoothing and answers of data that hold several."""
    return own.model_copy(update={"stages": {name: _stage(stage, values) for name, stage in own.stages.items()}})


def _stage(stage: StageSpec, values: Values) -> StageSpec:
    optimiser = stage.optimiser
    rates = {part: values["rate"] * rate for part, rate in optimiser.learning_rates.items()}
    optimiser = optimiser.model_copy(update={"learning_rate": values["rate"] * optimiser.learning_rate, "learning_rates": rates})
    terms = {name: _smoothed(spec, values["label_smoothing"]) for name, spec in stage.terms.items()}
    data = stage.data
    if values["target"] is not None:
        data = [spec if spec.target == "teacher" or spec.answers else _answered(spec, values["target"]) for spec in data]
    return stage.model_copy(update={"optimiser": optimiser, "terms": terms, "data": data})


def _answered(spec: Any, target: str) -> Any:
    return spec.model_copy(update={"target": target})


def _smoothed(spec: TermSpec, smoothing: float) -> TermSpec:
    if spec.kind != "cross_entropy" or not smoothing:
        return spec
    return TermSpec.model_validate(spec.model_dump(exclude_unset=True) | {"label_smoothing": smoothing})


def _what_is_learnt(recipe: Recipe) -> str:
    """Equal for values that change nothing, such as another choice among answers of which there is one each."""
    stages = {name: stage.model_dump(mode="json", exclude={"data"}) for name, stage in recipe.stages.items()}
    try:
        data = [samples_fingerprint(stage_samples(recipe, stage)) for stage in recipe.stages.values()]
    except DataError as error:
        raise DataError(f"controls, tuned: {error}") from error
    return f"{stages} {data}"


def _in_words(values: Values) -> str:
    target = values["target"] or "answers as the recipe has them"
    return f"{values['rate']:g} times the rate, label smoothing {values['label_smoothing']:g}, {target}"
