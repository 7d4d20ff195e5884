"""`mmkd estimate`: parts that add up, a measured step that changes nothing, and advice that is a recipe's own keys."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import the_teacher, tiny_picture, tiny_tower

from mmkd.data.samples import Sample, Turn
from mmkd.recipes.reading import _apply, validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.estimate import PARTS, estimate, stage_estimate
from mmkd.runs.measure import bytes_given_out, candidates
from mmkd.runs.towers import build_student
from mmkd.train.distiller import Distiller


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


def test_the_largest_pictures_and_texts_are_among_those_that_are_measured(tmp_path):
    small, large = (tiny_picture(tmp_path, f"{side}.png", side, (side, side)) for side in (8, 64))
    samples = [Sample(str(n), (small,), (Turn("user", "what", 1), Turn("assistant", "red"))) for n in range(999)]
    samples[501] = replace(samples[501], images=(large,))
    samples[737] = replace(samples[737], turns=(Turn("user", "what " * 50, 1), Turn("assistant", "red")))
    names = [sample.id for sample in candidates(samples, 2)]
    assert {"501", "737"} <= {*names} and len(names) == len({*names}) < 100
    assert names[:3] == ["0", "15", "30"]  # those that stand for all come first


def test_bytes_are_those_that_were_held_at_once():
    def work():
        kept = [torch.ones(1000)]
        kept.append(torch.ones(3000))
        del kept[1]
        kept.append(torch.ones(2000))

    assert bytes_given_out(torch.device("cpu"), work) == pytest.approx(16000, abs=256)


def starved(monkeypatch, most):
    """No more than `most` samples fit."""
    forward = Distiller.forward

    def refuse(self, batch, *given, **named):
        if len(batch.student.ids) > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch, *given, **named)

    monkeypatch.setattr(Distiller, "forward", refuse)


def test_what_does_not_fit_is_measured_with_less_and_scaled(raw, monkeypatch):
    whole, *_ = measured(raw)
    starved(monkeypatch, 3)
    found, *_ = measured(raw)
    assert found.fits == 2 and found.seconds == 0
    assert found.total == pytest.approx(whole.total, rel=0.25)
    assert "not timed, since it does not fit here" in found.lines(1)[0]


def test_where_not_even_one_sample_fits_there_is_advice(raw, monkeypatch):
    starved(monkeypatch, 0)
    found, *_ = measured(raw)
    text = "\n".join(found.lines(2**40))
    assert found.fits == 0 and "not even one sample fits" in text and "mmkd cache" in text


def test_a_kept_teacher_reads_every_sample_once(raw):
    live, *_ = measured(raw)
    kept, *_ = measured({**raw, "teacher": {**raw["teacher"], "keep": True}})
    assert live.once == 0 and kept.once > 0 and kept.distinct == 16
    assert kept.all_seconds == pytest.approx(kept.once + kept.steps * kept.seconds + 16 * kept.preparing)


def test_micro_batches_by_tokens_are_measured_as_they_are_split(raw):
    whole, *_ = measured(raw)
    found, *_ = measured(raw, micro_batch_tokens=60)
    assert whole.micro_batches == 1 and found.micro_batches > 2
    assert found.memory["activations"] < 0.7 * whole.memory["activations"]
