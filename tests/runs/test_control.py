"""What the SFT control learns from."""

import pytest

from mmkd.runs.control import control_recipe
from mmkd.recipes.recipe import Recipe


def control_of(**stage):
    stages = {"one": {"data": [{"card": "a"}], "steps": 1, **stage}}
    models = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    recipe = Recipe.model_validate({"title": "t", "output": "o", **models, "stages": stages})
    control = control_recipe(recipe)
    assert control.teacher is None
    return {term.kind: term.weight for term in control.stages["one"].terms.values()}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"cross_entropy": 0.5, "forward_kl": 2.0}, {"cross_entropy": 0.5}),
        ({"forward_kl": 1.0}, {"cross_entropy": 1.0}),
        ({"forward_kl": 1.0, "load_balance": 0.01}, {"load_balance": 0.01, "cross_entropy": 1.0}),
        ({"contrastive": 1.0, "tags": 0.1}, {"contrastive": 1.0, "tags": 0.1}),
    ],
)
def test_terms_without_a_teacher_stay_and_cross_entropy_stands_for_the_others(terms, expected):
    assert control_of(terms=terms) == expected


def test_a_stage_may_name_its_controls_terms():
    assert control_of(terms={"dpo": 1.0}, control_terms={"cross_entropy": 0.3}) == {"cross_entropy": 0.3}
