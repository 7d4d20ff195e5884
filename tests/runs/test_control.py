"""What controls learn from, how long, and that the best of them counts."""

import json
import math
import os
from pathlib import Path

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.errors import RecipeError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.compute import operations
from mmkd.runs.control import control_key, control_recipe
from mmkd.runs.run import distill
from mmkd.runs.towers import build_student, load_teachers


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


def test_terms_on_the_students_own_answers_leave_the_control():
    own = {"answers": {"student": {"share": 0.5, "samples": 4}, "data": 0.5}}
    assert control_of(terms={"group_reward": 1.0}, **own) == {"cross_entropy": 1.0}
    assert control_of(terms={"group_reward": 1.0, "cross_entropy": 0.5}, **own) == {"cross_entropy": 0.5}


def test_a_stage_may_name_its_controls_terms():
    assert control_of(terms={"dpo": 1.0}, control_terms={"cross_entropy": 0.3}) == {"cross_entropy": 0.3}


@pytest.fixture
def easy_vqa(tmp_path):
    """A set whose questions lie deeper than its root, and the control's key for a recipe that trains on it."""
    root, student = tmp_path / "data", tiny_tower(1, 16)
    (root / "train" / "images").mkdir(parents=True)
    tiny_picture(root / "train" / "images", "0.png", 0)
    stages = {"one": {"data": [{"format": "easy_vqa", "root": str(root)}], "steps": 1, "terms": {"cross_entropy": 1.0}}}
    recipe = control_recipe(Recipe.model_validate({"title": "t", "output": "o", "student": {"model": "s"}, "stages": stages}))

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


# ---- several controls ------------------------------------------------------------------------------------------------


def recipe_of(root=None, **keys):
    stage = {"data": [{"card": "a"}], "steps": 10, "terms": {"cross_entropy": 1.0, "forward_kl": 2.0}}
    models = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    return validate({"title": "t", "output": "o", **models, "stages": {"one": stage}, **keys}, "test", Recipe)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, ["equal_steps", "equal_compute"]),
        ({"control": True}, ["equal_steps", "equal_compute"]),
        ({"control": False}, []),
        ({"controls": []}, []),
        ({"controls": ["equal_compute"]}, ["equal_compute"]),
        ({"controls": ["equal_steps", {"fast": {"kind": "equal_steps"}}]}, ["equal_steps", "fast"]),
        ({"controls": {"equal_compute": None, "fast": {"kind": "equal_steps"}}}, ["equal_compute", "fast"]),
    ],
)
def test_controls_are_named_in_several_ways(keys, names):
    assert list(recipe_of(**keys).controls) == names


def test_a_control_has_keys_of_its_own():
    own = {"steps": 30, "optimiser": {"learning_rate": 2e-3}, "data": [{"card": "b", "target": "majority"}]}
    recipe = recipe_of(controls={"tuned": {"kind": "equal_steps", "stages": {"one": own}}})
    stage = control_recipe(recipe, recipe.controls["tuned"]).stages["one"]
    assert (stage.steps, stage.optimiser.learning_rate, stage.data[0].card) == (30, 2e-3, "b")
    assert list(stage.terms) == ["cross_entropy"]
    by_epochs = recipe_of(controls={"long": {"kind": "equal_steps", "stages": {"one": {"epochs": 2}}}})
    stage = control_recipe(by_epochs, by_epochs.controls["long"]).stages["one"]
    assert (stage.steps, stage.epochs) == (None, 2)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (["equal_stebs"], "equal_stebs"),
        ({"a": {"kind": "equal_steps", "stages": {"two": {"steps": 3}}}}, "there is no stage 'two'; known: one"),
        ({"a": {"kind": "equal_steps", "stages": {"one": {"stebs": 3}}}}, "stebs"),
        ({"a": {"kind": "equal_steps", "stages": {"one": {"steps": -3}}}}, "steps"),
    ],
)
def test_controls_that_are_wrong_are_refused(controls, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(controls=controls)


def test_both_keys_at_once_are_refused():
    with pytest.raises(RecipeError, match="either `control`"):
        recipe_of(control=True, controls=[])


def test_a_longer_control_has_as_many_times_the_steps():
    recipe = recipe_of()
    assert control_recipe(recipe, recipe.controls["equal_compute"], {"one": 2.31}).stages["one"].steps == 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe with a teacher four times as wide, on one picture."""
    root = tmp_path_factory.mktemp("controls")
    teacher = tiny_tower(5, 64)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    tiny_picture(root, "a.png", 0)
    rows = [{"image": "a.png", "question": f"{n}?", "answer": "red"} for n in range(16)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "data": [{"format": "jsonl", "root": str(root), "prompt": "plain"}], "steps": 2, "optimiser": {"batch_size": 8},
        "terms": {"cross_entropy": 1.0, "forward_kl": 1.0},
    }  # fmt: skip
    towers = {role: {"model": str(root / role)} for role in ("teacher", "student")}
    guards = {"pixels_matter": False, "teacher_is_better": False}
    raw = {"title": "t", "output": str(root / "out" / "run"), **towers, "stages": {"only": stage}, "guards": guards}
    return validate(raw, "test", Recipe)


def test_operations_of_a_step_count_the_teacher(whole):
    teachers = load_teachers(whole)

    def fresh():
        return build_student(whole, teachers, [])

    with_teacher, again = (operations(whole, fresh(), teachers)["only"] for _ in range(2))
    alone = operations(control_recipe(whole), fresh(), {})["only"]
    assert with_teacher == again > 2 * alone > 0  # matrices of the teacher's forward pass alone have 16 times the student's


def test_equal_compute_trains_the_control_for_longer(whole):
    distill(whole)
    run = Path(whole.output)
    facts = json.loads((run / "controls.json").read_text())
    counted = facts["control_equal_compute"]["operations"]
    ratio = counted["student"]["only"] / counted["control"]["only"]
    assert facts["control"]["steps"] == {"only": "2 steps"}
    assert facts["control_equal_compute"]["steps"] == {"only": f"{math.ceil(2 * ratio)} steps"}
    last = (run / "control_equal_compute" / "model.safetensors").read_bytes()
    assert last != (run / "control" / "model.safetensors").read_bytes()
    assert (run / "log" / "control_equal_compute.jsonl").exists()
