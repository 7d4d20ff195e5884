"""Samplers that ask models, in a run: asked once, kept, and the same order after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_picture, tiny_tower

from mmkd.base.checksums import hash_of
from mmkd.data.samples import Turn
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.run import distill
from mmkd.runs.scores import answers_until_right, with_scores
from mmkd.runs.towers import build_student, load_teachers
from mmkd.train.guards import answer_loss, answer_rows
from mmkd.train.trainer import DistillTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    teacher = tiny_tower(5, 16)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    for n in range(3):
        tiny_picture(root, f"{n}.png", n)
    words = ("red", "a blue round", "green")
    for part, name in enumerate(("a", "b")):
        rows = [
            {"id": f"{name}{n}", "image": f"{n % 3}.png", "question": f"what is {name} {n}?", "answer": words[n % (2 + part)]}
            for n in range(20)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe_of(folder, output, sampler, **stage):
    data = [{"format": "jsonl", "root": str(folder), "files": {"annotations": f"{name}.jsonl"}} for name in ("a", "b")]
    made = {"data": data, "steps": 8, "save_every": 3, "sampler": sampler, "optimiser": {"batch_size": 4, "learning_rate": 0.05},
            "terms": {"cross_entropy": 1.0}, **stage}  # fmt: skip
    raw = {
        "title": "t", "output": str(output), "stages": {"only": made}, "controls": False,
        "teacher": {"model": str(folder / "teacher")}, "student": {"model": str(folder / "student")},
        "guards": {"pixels_matter": False, "teacher_is_better": False},
    }  # fmt: skip
    return validate(raw, "test", Recipe)


def towers(recipe):
    teachers = load_teachers(recipe)
    return teachers, build_student(recipe, teachers, [])


def rows_of(recipe):
    return [json.loads(line) for line in Path(recipe.stages["only"].sampler.scores).read_text().splitlines()]


def test_scores_are_what_the_towers_say(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", {"kind": "difference", "grounding": 0.5})
    teachers, student = towers(recipe)
    found = with_scores(recipe, "only", teachers, student)
    samples = stage_samples(recipe, recipe.stages["only"])
    rows = rows_of(found)
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    for number in (0, 7, 30):
        for name, tower, sample in (
            ("teacher", teachers["teacher"].tower, samples[number]), ("student", student, samples[number]),
            ("teacher_blind", teachers["teacher"].tower, samples[number].without_images()),
        ):  # fmt: skip
            inputs = tower.prepare([sample])
            assert rows[number][name] == pytest.approx(answer_loss(tower, inputs, answer_rows(tower, inputs)), rel=1e-4)
    order = found.stages["only"].order.build(samples, [20, 20], 4, 0)
    ahead = [row["student"] - row["teacher"] + 0.5 * (row["teacher_blind"] - row["teacher"]) for row in rows]
    assert sorted(order) == sorted(sorted(range(40), key=lambda n: -ahead[n])[:20])


def test_margins_and_probabilities_are_of_the_first_word(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", {"kind": "robust_active"})
    teachers, student = towers(recipe)
    samples = stage_samples(recipe, recipe.stages["only"])
    found = with_scores(recipe, "only", teachers, student)
    rows = rows_of(found)
    inputs = student.prepare([samples[3]])
    spread = torch.nn.functional.linear(answer_rows(student, inputs)[0], student.head.weight).softmax(-1).detach()
    top = spread.topk(2).values
    assert rows[3]["margin"] == pytest.approx((top[0] - top[1]).item(), abs=1e-5)
    other = recipe_of(folder, tmp_path / "run", {"kind": "pcoreset"})
    rows = rows_of(with_scores(other, "only", teachers, student))
    first = student.answer_tokens(samples[3], samples[3].answer)[0]
    assert any(value == pytest.approx(float(spread[first]), abs=1e-5) for value in rows[3]["probabilities"])
    assert len(rows[3]["probabilities"]) == len({student.answer_tokens(one, one.answer)[0] for one in samples})


def test_tries_are_counted_up_to_the_first_right_answer_and_a_lower_cap_leaves_more_unsolved(folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder, tmp_path / "run", {"kind": "difficulty", "cap": 4})
    _, student = towers(recipe)
    samples = stage_samples(recipe, recipe.stages["only"])[:20]
    right_at = {sample.id: n % 6 + 1 for n, sample in enumerate(samples)}
    by_prompt, tried = {}, {}
    for sample in samples:
        by_prompt[tuple(student.encode(sample, with_answer=False).input_ids.tolist())] = sample

    def drawn(tower, prompts, seeds, how):
        assert how.max_new_tokens == 5 and len(set(seeds)) == len(seeds)
        found = []
        for prompt, _ in prompts:
            sample = by_prompt[tuple(prompt.input_ids.tolist())]
            tried[sample.id] = tried.get(sample.id, 0) + 1
            said = f" {sample.answer.upper()}. " if tried[sample.id] == right_at[sample.id] else "nothing"
            found.append([*tower.tokenizer(said, add_special_tokens=False).input_ids, min(tower.stop_ids)])
        return found

    monkeypatch.setattr("mmkd.runs.scores.sample_answers", drawn)
    for cap in (4, 2):
        tried.clear()
        assert answers_until_right(student, samples, cap, 0.8, 5) == [min(right_at[s.id], cap + 1) for s in samples]
        assert tried == {name: min(number, cap) for name, number in right_at.items()}


def test_an_answer_that_is_tried_is_the_same_in_any_batch(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", {"kind": "difficulty", "cap": 2})
    _, student = towers(recipe)
    samples = stage_samples(recipe, recipe.stages["only"])[:6]
    samples = [replace(sample, turns=(*sample.prompt_turns, Turn("assistant", "e"))) for sample in samples]
    together = answers_until_right(student, samples, 30, 1.0, 1)
    assert together == [answers_until_right(student, [one], 30, 1.0, 1)[0] for one in samples]
    assert answers_until_right(student, samples, 3, 1.0, 1) == [min(n, 4) for n in together]


def test_both_models_probabilities_are_of_the_same_words(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", {"kind": "joint_confidence"})
    teachers, student = towers(recipe)
    with_scores_of_both = with_scores(recipe, "only", teachers, student)
    row, sample = rows_of(with_scores_of_both)[3], stage_samples(recipe, recipe.stages["only"])[3]
    first = student.answer_tokens(sample, sample.answer)[0]
    for name, tower in (("probabilities", student), ("teacher_probabilities", teachers["teacher"].tower)):
        rows = answer_rows(tower, tower.prepare([sample]))
        spread = torch.nn.functional.linear(rows[0], tower.head.weight).softmax(-1).detach()
        assert any(value == pytest.approx(float(spread[first]), abs=1e-5) for value in row[name])
    assert len(row["probabilities"]) == len(row["teacher_probabilities"])


@pytest.mark.parametrize("kind", ["difference", "robust_active", "pcoreset", "joint_confidence", "difficulty"])
def test_a_run_trains_on_what_was_chosen_and_asks_once(folder, tmp_path, monkeypatch, kind):
    kind = {"kind": kind, "cap": 2, "least": 2} if kind == "difficulty" else kind
    recipe = recipe_of(folder, tmp_path / "run", kind, steps=2)
    distill(recipe)
    (path,) = (tmp_path / "scores").glob("*/scores.jsonl")
    assert len(path.read_text().splitlines()) == 40
    monkeypatch.setattr("mmkd.runs.scores._values", None)
    distill(recipe_of(folder, tmp_path / "other", kind, steps=2))
    assert hash_of(tmp_path / "run/student/model.safetensors") == hash_of(tmp_path / "other/student/model.safetensors")


def test_controls_without_a_teacher_draw_without_it(folder, tmp_path):
    for sampler, kept in ((("difference"), False), ("ddk", False), ("robust_active", True)):
        recipe = recipe_of(folder, tmp_path / "run", sampler)
        assert (control_recipe(recipe).stages["only"].sampler is not None) == kept


def test_moving_shares_are_the_same_after_a_kill(folder, tmp_path, monkeypatch):
    sampler, terms = {"kind": "ddk", "every": 2, "held_out": 2}, {"cross_entropy": 1.0, "forward_kl": 0.2}
    distill(recipe_of(folder, tmp_path / "whole", sampler, terms=terms))
    step, count = DistillTrainer.training_step, [0]

    def killed(self, *arguments, **keys):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **keys)

    monkeypatch.setattr(DistillTrainer, "training_step", killed)
    recipe = recipe_of(folder, tmp_path / "killed", sampler, terms=terms)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe)
    (checkpoint,) = (tmp_path / "killed" / "stages" / "student" / "0_only").glob("checkpoint-*")
    assert len(json.loads((checkpoint / "mixture.json").read_text())) == 2  # before step 1, and after step 2
    distill(recipe)
    assert count[0] == 6 + 5
    assert hash_of(tmp_path / "killed/student/model.safetensors") == hash_of(tmp_path / "whole/student/model.safetensors")
