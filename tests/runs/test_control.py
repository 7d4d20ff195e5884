"""What the SFT control learns from."""

import json
import os

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_key, control_recipe


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


@pytest.fixture
def easy_vqa(tmp_path):
    """A set whose questions lie deeper than its root, and the control's key for a recipe that trains on it."""
    root, student = tmp_path / "data", tiny_tower(1, 16)
    (root / "train" / "images").mkdir(parents=True)
    tiny_picture(root / "train" / "images", "0.png", 0)
    stages = {"one": {"data": [{"format": "easy_vqa", "root": str(root)}], "steps": 1, "terms": {"cross_entropy": 1.0}}}
    recipe = Recipe.model_validate({"title": "t", "output": "o", "student": {"model": "s"}, "stages": stages})

    def key(answer="teal"):
        rows = [["what color is the shape?", answer, 0]]
        (root / "train" / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
        return control_key(recipe, student)

    return root, key


def test_questions_that_were_rewritten_make_a_new_control(easy_vqa):
    _, key = easy_vqa
    assert key() == key() != key("red")


def test_pictures_that_were_replaced_make_a_new_control(easy_vqa):
    root, key = easy_vqa
    before = key()
    tiny_picture(root / "train" / "images", "0.png", 5)
    assert key() != before


def test_files_beside_the_data_and_new_times_keep_the_control(easy_vqa):
    root, key = easy_vqa
    before = key()
    (root / "unrelated.json").write_text("[]", encoding="utf-8")
    (root / "train" / "unrelated.jsonl").write_text("", encoding="utf-8")
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    assert key() == before
