"""`target: teacher` and the control on hard answers: asked once, gone on with, learnt from."""

import json
from pathlib import Path

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.errors import DataError
from mmkd.recipes.controls import ControlSpec
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_errors, control_recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.run import distill
from mmkd.runs.teacher_answers import all_by_teacher, with_teacher_answers
from mmkd.runs.towers import load_teachers
from mmkd.towers.tower import Tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight questions with a label and twelve without, on one picture."""
    root = tmp_path_factory.mktemp("answers")
    teacher = tiny_tower(5, 64)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    tiny_picture(root, "a.png", 0)
    labelled = [{"image": "a.png", "question": f"what is {n}?", "answer": "red"} for n in range(8)]
    open_ones = [{"image": "a.png", "question": f"and what is {n}?"} for n in range(12)]
    for name, rows in (("labelled", labelled), ("open", open_ones)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe_of(folder, output, **keys):
    entry = {"format": "jsonl", "root": str(folder), "prompt": "plain"}
    data = [
        {**entry, "files": {"annotations": "labelled.jsonl"}},
        {**entry, "files": {"annotations": "open.jsonl"}, "target": "teacher"},
    ]
    stage = {"data": data, "steps": 2, "optimiser": {"batch_size": 4}, "terms": {"cross_entropy": 1.0, "forward_kl": 1.0}}
    towers = {role: {"model": str(folder / role)} for role in ("teacher", "student")}
    guards = {"pixels_matter": False, "teacher_is_better": False}
    raw = {"title": "t", "output": str(output), **towers, "stages": {"only": stage}, "guards": guards, **keys}
    return validate(raw, "test", Recipe)


def file_of(recipe):
    (path,) = {spec.answers for spec in recipe.stages["only"].data if spec.answers}
    return Path(path)


def test_the_teachers_answers_are_what_is_learnt(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run")
    teachers = load_teachers(recipe)
    found = with_teacher_answers(recipe, teachers)
    samples = stage_samples(found, found.stages["only"])
    asked = [sample for sample in samples if sample.turns[0].text.startswith("and")]
    assert [sample.answer for sample in samples[:8]] == ["red"] * 8
    expected = teachers["teacher"].tower.answer(asked, max_new_tokens=256)
    said = {sample.id: sample.answer for sample in asked}
    assert asked and said == {sample.id: text for sample, text in zip(asked, expected, strict=True) if text}


def test_nothing_is_asked_twice_and_a_kill_loses_one_batch_at_most(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mmkd.runs.teacher_answers.BATCH", 5)
    recipe = recipe_of(folder, tmp_path / "run")
    teachers = load_teachers(recipe)
    whole = file_of(with_teacher_answers(recipe, teachers)).read_text()
    asked = []
    answer = Tower.answer

    def counted(tower, samples, **options):
        asked.append(len(samples))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(tower, samples, **options)

    monkeypatch.setattr(Tower, "answer", counted)
    other = recipe_of(folder, tmp_path / "other" / "run")
    with pytest.raises(KeyboardInterrupt):
        with_teacher_answers(other, teachers)
    path = next((tmp_path / "other" / "answers").glob("*/answers.jsonl"))
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:5])
    path.write_text(path.read_text() + '{"id": "torn')
    assert file_of(with_teacher_answers(other, teachers)).read_text() == whole
    assert asked == [5, 5, 5, 2]
    with_teacher_answers(other, teachers)
    assert asked == [5, 5, 5, 2]


def test_another_teacher_and_other_questions_are_asked_anew(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run")
    first = file_of(with_teacher_answers(recipe, load_teachers(recipe)))
    other = recipe_of(folder, tmp_path / "run2", teacher={"model": str(folder / "student")})
    assert file_of(with_teacher_answers(other, load_teachers(other))) != first
    again = recipe_of(folder, tmp_path / "run3")
    assert file_of(with_teacher_answers(again, load_teachers(again))) == first


def test_controls_without_a_teacher_learn_from_the_labels_alone(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run")
    teachers = load_teachers(recipe)
    found = with_teacher_answers(recipe, teachers)
    control = control_recipe(found, found.controls["equal_steps"])
    assert {s.answer for s in stage_samples(control, control.stages["only"])} == {"red"}
    assert len(stage_samples(control, control.stages["only"])) == 8
    hard = all_by_teacher(found, teachers)
    said = [sample.answer for sample in stage_samples(hard, hard.stages["only"])]
    assert len(said) > 8 and said[:8] != ["red"] * 8


def test_the_same_questions_are_drawn_for_several_seeds(folder, tmp_path):
    def drawn(**keys):
        recipe = recipe_of(folder, tmp_path / "run", **keys)
        entry = recipe.stages["only"].data[0].model_copy(update={"limit": 4})
        stage = recipe.stages["only"].model_copy(update={"data": [entry]})
        return [sample.id for sample in stage_samples(recipe, stage)]

    by_seed = [drawn(seed=seed) for seed in range(4)]
    assert len({*map(tuple, by_seed)}) > 1
    assert [drawn(seed=seed, data_seed=2) for seed in range(4)] == [by_seed[2]] * 4


def test_a_stage_without_labels_has_no_control_without_a_teacher(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run")
    stage = recipe.stages["only"]
    unlabelled = recipe.model_copy(update={"stages": {"only": stage.model_copy(update={"data": stage.data[1:]})}})
    with pytest.raises(DataError, match="nothing to learn from; take"):
        control_recipe(unlabelled, unlabelled.controls["equal_steps"])
    both = unlabelled.model_copy(update={"controls": {**unlabelled.controls, "hard_answers": ControlSpec(kind="hard_answers")}})
    assert [error.split(":")[0] for error in control_errors(both)] == ["controls.equal_steps", "controls.equal_compute"]


def test_a_run_is_held_against_hard_answers(folder, tmp_path):
    (folder / "test.jsonl").write_text((folder / "labelled.jsonl").read_text())
    asked = {"data_root": str(folder), "evaluation": {"benchmarks": ["jsonl"]}}
    summary = distill(recipe_of(folder, tmp_path / "run", controls=["equal_steps", "hard_answers"], **asked))
    entry = summary["benchmarks"]["jsonl"]
    leads = {key: entry[f"student_minus_{key}"] for key in ("best_control", "hard_answers")}
    assert {key: lead["name"] for key, lead in leads.items()} == {"best_control": "equal_steps", "hard_answers": "hard_answers"}
    assert leads["hard_answers"]["mean"] == pytest.approx(entry["student"] - entry["controls"]["hard_answers"]["score"])
    facts = json.loads((tmp_path / "run" / "controls.json").read_text())
    assert facts["hard_answers"]["kind"] == "hard_answers" and facts["control"]["steps"] == {"only": "2 steps"}
    assert (tmp_path / "run" / "hard_answers" / "model.safetensors").exists()
    assert (tmp_path / "run" / "log" / "hard_answers.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no answers"),
        ("[1]\n", 'line 1: {"id"'),
        ('{"id": "1", "answer": 3}\n', "line 1"),
        ("{torn\n", "holds no answers"),
        ('{"id": "nobody", "answer": "x"}\n', "no sample gets an answer"),
    ],
)
def test_a_file_of_answers_that_is_wrong_is_refused(folder, tmp_path, content, message):
    (tmp_path / "answers.jsonl").write_text(content)
    recipe = recipe_of(folder, tmp_path / "run")
    stage = recipe.stages["only"]
    entry = stage.data[0].model_copy(update={"answers": str(tmp_path / "answers.jsonl")})
    stage = stage.model_copy(update={"data": [entry]})
    with pytest.raises(DataError, match=message):
        stage_samples(recipe, stage)
