"""Talks that a tower cannot learn whole are taught answer by answer, alike for student, teacher and control."""

import datetime as dt
import json

import pytest
import yaml
from tiny import tiny_picture, tiny_tower

from mmkd.recipes.reading import load_recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.control import control_recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.dates import with_day
from mmkd.runs.towers import build_student, load_teachers
from mmkd.towers.templates import CHAT_TEMPLATES
from mmkd.train.build_stage import build_stage

COUNTING = "{{ messages | length }}" + CHAT_TEMPLATES["simple"]  # changes what it wrote before
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATES["simple"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_tower(0).save(folder / "student")
    tiny_tower(1).save(folder / "teacher")
    return folder


@pytest.fixture
def recipe_of(models, tmp_path):
    def make(*overrides: str, student: str | None = None):
        tiny_picture(tmp_path, "0.png", 0)
        said = ["<image>\nwhat is it?", "red", "and now?", "round", "sure?", "yes"]
        turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]
        rows = [{"id": f"talk {count}", "image": "0.png", "conversations": turns[:count]} for count in (2, 4, 6)]
        (tmp_path / "train.json").write_text(json.dumps(rows))
        data = [{"format": "llava", "root": str(tmp_path), "files": {"annotations": "train.json", "images": "."}}]
        recipe = {
            "title": "talks", "output": str(tmp_path / "run"), "max_length": 200,
            "teacher": {"model": str(models / "teacher")},
            "student": {"model": str(models / "student")} | ({"chat_template": student} if student else {}),
            "stages": {"only": {
                "data": data, "epochs": 1, "terms": {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}},
                "optimiser": {"batch_size": 1, "micro_batch_size": 1},
            }},
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(path, list(overrides))

    return make


def loaded(recipe):
    teachers = load_teachers(recipe)
    return build_student(recipe, teachers, []), teachers


def test_talks_stay_whole_where_both_towers_learn_them_so(recipe_of):
    recipe = recipe_of()
    assert with_answers_apart(recipe, *loaded(recipe)) == recipe


def test_talks_come_apart_for_all_where_one_tower_needs_it(recipe_of, caplog):
    recipe = recipe_of(student=COUNTING)
    student, teachers = loaded(recipe)
    with caplog.at_level("INFO", "mmkd"):
        apart = with_answers_apart(recipe, student, teachers)
    assert "2 samples are taught answer by answer" in caplog.text and "prompts of student" in caplog.text
    assert "6 samples in all" in caplog.text
    samples = stage_samples(apart, apart.stages["only"])
    assert [s.answer for s in samples] == ["red", "red", "round", "red", "round", "yes"]
    assert len({s.id for s in samples}) == 6 and all(len(s.images) == 1 for s in samples)
    control = control_recipe(apart)
    assert stage_samples(control, control.stages["only"]) == samples
    stage = build_stage("only", apart.stages["only"], apart, student, teachers, samples)
    for index, sample in enumerate(samples):
        pair = stage.dataset[index]
        for tower, encoded in ((student, pair.student), (teachers["teacher"].body, pair.teachers["teacher"].inputs)):
            assert tower.tokenizer.decode(encoded.targets[encoded.targets >= 0]) == f" {sample.answer}<|end|>"
    assert "earlier answer is not learned" not in caplog.text


def test_a_stage_can_say_how_talks_are_taught(recipe_of, caplog):
    recipe = recipe_of("stages.only.one_answer=true")
    assert len(stage_samples(recipe, recipe.stages["only"])) == 6
    recipe = recipe_of("stages.only.one_answer=false", student=COUNTING)
    student, teachers = loaded(recipe)
    assert with_answers_apart(recipe, student, teachers) == recipe
    student.prepare(stage_samples(recipe, recipe.stages["only"]))
    assert "an earlier answer is not learned" in caplog.text


def test_a_run_keeps_the_day_that_a_template_prints(recipe_of):
    recipe = recipe_of(student=DATED)
    student, teachers = loaded(recipe)
    kept = with_day(recipe, dt.date(2026, 1, 31), student, teachers)
    (sample, *_) = stage_samples(recipe, recipe.stages["only"])
    assert student.preparer.prompt_text(sample).startswith("2026-01-31<|user|>")
    assert build_student(kept, teachers, []).preparer.prompt_text(sample).startswith("2026-01-31<|user|>")
    assert with_day(recipe_of(), dt.date(2026, 1, 31), *loaded(recipe_of())) == recipe_of()
