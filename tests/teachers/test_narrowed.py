"""LAD: a teacher that is told two choices, trained on the words that it is later asked with."""

import json
from dataclasses import replace

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.data.prompts import render
from mmkd.data.samples import Question
from mmkd.errors import DataError, SampleError
from mmkd.recipes.reading import load_recipe, validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.run import distill
from mmkd.teachers.view import View

VIEW = View("{prompt} {narrowed}")
CHOICES = ("cat", "dog", "cow", "hen")


def asked(number, index):
    question = Question(f"q{number}", "Which?", choices=CHOICES, answer_index=index)
    return VIEW(render(question, "letter", with_answer=True))


def test_one_of_two_is_right_and_its_place_tells_nothing():
    """Over many samples the right choice stands first as often as second, and each wrong one is as frequent."""
    first, wrong = 0, dict.fromkeys(CHOICES, 0)
    for number in range(2000):
        sample = asked(number, number % 4)
        told = [entry.split(". ") for entry in sample.turns[0].text.rpartition("directly. ")[2].split("; ")]
        right = CHOICES[number % 4]
        assert len(told) == 2 and right in {text for _, text in told} and told[0] != told[1]
        assert all("ABCD"[CHOICES.index(text)] == letter for letter, text in told)
        first += told[0][1] == right
        wrong[next(text for _, text in told if text != right)] += 1
    assert abs(first - 1000) < 5 * 500**0.5 and all(abs(count - 500) < 5 * 375**0.5 for count in wrong.values())
    assert asked(7, 3) == asked(7, 3) and sample.turns[-1].text == "D"


def test_questions_without_choices_are_refused():
    with pytest.raises(SampleError, match="has no choices"):
        VIEW(render(Question("q", "What?", answer="red"), "plain", with_answer=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lad")
    tower = tiny_tower(5, 16)
    tower.save(root / "student")
    tiny_picture(root, "a.png", 0)
    rows = [{"image": "a.png", "question": f"what is {n}?", "choices": CHOICES, "answer": n % 4} for n in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def raw_of(folder, output, **entry):
    data = {"format": "jsonl", "root": str(folder), "prompt": "letter", **entry}
    learn = {"data": [data], "steps": 2, "optimiser": {"batch_size": 4}, "terms": {"cross_entropy": 1.0}}
    guards = {"pixels_matter": False, "teacher_is_better": False}
    return {"title": "t", "output": str(output), "teacher": None, "student": {"model": str(folder / "student")},
            "stages": {"learn": learn}, "guards": guards, "controls": False}  # fmt: skip


def test_the_teacher_is_asked_what_it_was_trained_on_and_the_student_is_not_told(folder, tmp_path):
    first = raw_of(folder, tmp_path / "teacher", asked=VIEW.prompt)
    recipe = validate(first, "test", Recipe)
    trained = stage_samples(recipe, recipe.stages["learn"])
    distill(recipe)
    second = raw_of(folder, tmp_path / "run")
    second |= {"teacher": {"model": str(tmp_path / "teacher" / "student"), "prompt": VIEW.prompt}}
    second["stages"]["learn"]["terms"] = {"cross_entropy": 1.0, "forward_kl": {"weight": 3.0, "temperature": 4.0}}
    recipe = validate(second, "test", Recipe)
    plain = stage_samples(recipe, recipe.stages["learn"])
    assert [VIEW(sample).turns for sample in plain] == [sample.turns for sample in trained]
    assert all(";" in a.turns[0].text and ";" not in b.turns[0].text for a, b in zip(trained, plain, strict=True))
    assert [replace(a, turns=()) for a in trained] == [replace(b, turns=()) for b in plain]
    distill(recipe)
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.parametrize(
    ("template", "told"), [("{nothing}", "has no 'nothing'"), ("no field", "names no field"), ("{", "data.asked")]
)
def test_mistakes_are_said(folder, tmp_path, template, told):
    recipe = validate(raw_of(folder, tmp_path / "run", asked=template), "test", Recipe)
    with pytest.raises(DataError, match=told):
        stage_samples(recipe, recipe.stages["learn"])


def test_the_recipes_ask_alike():
    teacher, student = load_recipe("scripts/recipes/lad_teacher.yaml"), load_recipe("scripts/recipes/lad.yaml")
    assert teacher.stages["learn"].data[0].asked == student.teacher.prompt and student.stages["learn"].data[0].asked is None
    assert str(student.teacher.model).endswith("runs/lad_teacher/student")
