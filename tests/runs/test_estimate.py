"""`mmkd estimate`: parts that add up, a measured step that changes nothing, and advice that is a recipe's own keys."""

import json

import pytest
import torch
from tiny import the_teacher, tiny_picture, tiny_tower

from mmkd.recipes.reading import _apply, validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.estimate import PARTS, estimate, stage_estimate
from mmkd.runs.towers import build_student


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    teacher = tiny_tower(5, 32)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    tiny_picture(root, "a.png", 0)
    rows = [{"image": "a.png", "question": f"{n}?", "answer": "red"} for n in range(16)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "data": [{"format": "jsonl", "root": str(root), "prompt": "plain"}], "terms": {"kl": {"kind": "forward_kl"}},
        "steps": 10, "optimiser": {"batch_size": 8},
    }
    towers = {role: {"model": str(root / role)} for role in ("teacher", "student")}
    return {"title": "t", "output": str(root / "out"), **towers, "stages": {"only": stage}}


def measured(raw, **optimiser):
    stage = {**raw["stages"]["only"], "optimiser": {"batch_size": 8, **optimiser}}
    recipe = validate({**raw, "stages": {"only": stage}}, "test", Recipe)
    teacher = the_teacher(recipe)
    student = build_student(recipe, teacher, [])
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    stage = recipe.stages["only"]
    found, _ = stage_estimate(recipe, "only", stage, stage_samples(recipe, stage), student, {"teacher": teacher})
    return found, before, student, teacher.running()


def test_parts_follow_from_the_towers_and_the_batch(raw):
    found, before, student, teacher = measured(raw)
    small, *_ = measured(raw, micro_batch_size=2)
    assert tuple(found.memory) == PARTS and found.total == sum(found.memory.values()) and found.seconds > 0
    assert found.memory["teacher weights"] == 4 * teacher.parameter_count()["total"]
    assert found.memory["optimiser"] == 2 * found.memory["gradients"] == 8 * student.parameter_count()["total"]
    # Of a quarter of the samples, a quarter is kept for backward, beside what does not depend on them.
    assert 0.2 < small.memory["activations"] / found.memory["activations"] < 0.4
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_advice_is_overrides_that_the_recipe_takes(raw):
    found, *_ = measured(raw)
    lines = found.lines(found.total - 1)
    changes = [line.split()[0] for line in lines if "saves" in line]
    assert changes and lines[-1].endswith(": then it fits")
    for change in changes:
        if "=" in change:
            content = json.loads(json.dumps(raw))
            _apply(content, change)
            validate(content, "test", Recipe)
    assert "it does not fit" not in "\n".join(found.lines(found.total))
    assert "with all of these" in found.lines(1)[-1]


def test_the_page_names_time_memory_cache_and_disk(raw):
    page = estimate(validate(raw, "test", Recipe), memory=1.0)
    for part in (*PARTS, "10 steps of 8", "of 1.0 GiB", "a cache of the teacher: 16 samples", "disk: at most"):
        assert part in page
