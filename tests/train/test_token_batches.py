"""Micro-batches by tokens: never above the budget, as few as can be, and the same step whatever they are."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from tiny import tiny_family, tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tower, weights_of
from transformers import TrainerCallback

from mmkd.data.samples import Sample, Turn
from mmkd.errors import ImageError
from mmkd.towers.samples import Picture
from mmkd.train.spec import OptimiserSpec, StageSpec
from mmkd.train.token_batches import SAVED, ByTokens, count_line, padded, split

LOSSES = {"cross_entropy": 1, "kl": {"kind": "forward_kl"}, "relation": 1, "visual": {"kind": "jsd", "positions": "visual"}}


def of_many_lengths(folder, count, text_only=2, seed=3):
    """Samples whose questions have 1 to 60 words."""
    draw, found = random.Random(seed), []
    for sample in tiny_samples(folder, count - text_only, text_only=text_only, sizes=((20, 16), (40, 32), (16, 24))):
        words = " ".join(draw.choices(("red", "blue", "A", "B"), k=draw.choice((1, 3, 10, 60))))
        question = Turn("user", words, len(sample.images))
        found.append(Sample(sample.id, sample.images, (question, Turn("assistant", sample.answer))))
    return found


def runs_of(order):
    """All ways to cut a list into runs."""
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        places = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), len(order)]
        yield [order[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("seed", range(20))
def test_the_split_is_the_best_one_within_the_budget(seed):
    draw = random.Random(seed)
    lengths = [{"student": draw.randint(1, 60), "of teacher": draw.randint(1, 90)} for _ in range(draw.randint(1, 8))]
    pictured = [draw.random() < 0.7 for _ in lengths]
    budget = draw.choice((40, 150, 400, 5000))
    groups = split(lengths, pictured, budget)
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))

    def cost(cut):
        sizes = [padded([lengths[n] for n in run]) for run in cut]
        fits = all(size <= budget or len(run) == 1 for size, run in zip(sizes, cut, strict=True))
        return sum(sizes) + len(cut) * (budget // SAVED) if fits else 10**9

    order = sorted(range(len(lengths)), key=lambda n: (pictured[n], sum(lengths[n].values()), n))
    assert cost(groups) == min(map(cost, runs_of(order)))
    assert groups[0][-1] == order[-1]  # the longest comes first


def test_a_reading_that_some_samples_lack_is_padded_with_the_others():
    assert padded([{"student": 3, "of teacher switched": 5}, {"student": 4}]) == 2 * (4 + 5)


def stage_of(kind, folder, samples, terms=LOSSES, teacher=True, **optimiser):
    if kind == "llava":
        teacher_tower = tiny_tower(2, 32)
        student = tiny_tower(1, 16, tokenizer=teacher_tower.tokenizer)
    else:
        student, teacher_tower = tiny_family(kind, 1), tiny_family(kind, 2)
    for tower in (student, teacher_tower):
        tower.model.double()
    given = {"batch_size": 8, "micro_batch_size": None, **optimiser}
    return tiny_stage(student, teacher_tower if teacher else None, samples, terms, optimiser=given)


def gradients(folder, stage):
    """Of the first step: its gradients, its loss, and the micro-batches that it took."""
    trainer = tiny_stage_trainer(folder, stage)
    model, seen = trainer.model, []
    coming = iter(trainer.get_train_dataloader())
    trainer.state.max_steps, trainer.state.global_step = 4, 1
    batches, counts = trainer.get_batch_samples(coming, trainer.args.gradient_accumulation_steps, trainer.args.device)
    model.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    loss = sum(float(trainer.training_step(model, inputs, counts)) for inputs in batches)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss, seen


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_step_has_the_same_gradients_however_it_is_split(tmp_path, kind):
    samples = of_many_lengths(tmp_path / "pictures", 10)
    terms = LOSSES if kind == "llava" else {name: term for name, term in LOSSES.items() if name != "relation"}
    terms = terms | ({"switch": {"kind": "dbild", "path": "switch"}} if kind == "llava" else {})
    whole, loss, one = gradients(tmp_path / "a", stage_of(kind, tmp_path, samples, terms))
    assert len(one) == 1
    for budget in (300, 900):
        stage = stage_of(kind, tmp_path, samples, terms, micro_batch_tokens=budget)
        found, again, parts = gradients(tmp_path / str(budget), stage)
        assert len(parts) > 1 and {name for part in parts for name in part.student.ids} == {*one[0].student.ids}
        assert again == pytest.approx(loss, rel=1e-6) and found.keys() >= whole.keys()
        # A micro-batch without pictures gives zeros to what nothing reaches; a run freezes it.
        assert not any(found[name].any() for name in found.keys() - whole.keys())
        for name, gradient in whole.items():
            scale = float(gradient.abs().max()) + 1e-12
            assert float((found[name] - gradient).abs().max()) < 1e-6 * scale, name
        for part in parts:
            readings = [part.student, part.teachers["teacher"].inputs, *([part.switch] if part.switch is not None else [])]
            tokens = len(part.student.ids) * sum(reading.input_ids.shape[1] for reading in readings)
            assert tokens <= budget or len(part.student.ids) == 1


def weights_after(folder, samples, resume=None, until=None, workers=0, keys=None, **optimiser):
    teacher = tiny_tower(2, 32)
    student = tiny_tower(1, 16, tokenizer=teacher.tokenizer)
    stage = tiny_stage(
        student, teacher, samples, {"cross_entropy": 1, "kl": {"kind": "forward_kl"}},
        optimiser={"batch_size": 4, "micro_batch_size": None, **optimiser}, **(keys or {}),
    )  # fmt: skip
    trainer = tiny_stage_trainer(folder, stage)
    trainer.args.dataloader_num_workers = workers
    if until is not None:
        trainer.add_callback(StopAfter(until))
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(student), trainer


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("keys", [{}, {"sampler": "length"}], ids=["shuffle", "length"])
def test_a_stage_ends_where_fixed_batches_end(tmp_path, keys):
    samples = of_many_lengths(tmp_path / "pictures", 14)
    fixed, one = weights_after(tmp_path / "a", samples, keys=keys)
    by_tokens, two = weights_after(tmp_path / "b", samples, keys=keys, micro_batch_tokens=250)
    assert one.state.global_step == two.state.global_step == 4
    for name, tensor in fixed.items():
        torch.testing.assert_close(by_tokens[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    logs = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (one, two)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == 2


def test_stopped_and_gone_on_is_undisturbed_to_the_bit(tmp_path):
    samples = of_many_lengths(tmp_path / "pictures", 14)
    whole, _ = weights_after(tmp_path / "a", samples, micro_batch_tokens=250)
    weights_after(tmp_path / "b", samples, until=3, micro_batch_tokens=250)
    resume = str(tmp_path / "b" / "stages" / "checkpoint-3")
    again, _ = weights_after(tmp_path / "b", samples, resume=resume, micro_batch_tokens=250)
    with_workers, _ = weights_after(tmp_path / "c", samples, workers=1, micro_batch_tokens=250)
    assert all(torch.equal(whole[name], again[name]) and torch.equal(whole[name], with_workers[name]) for name in whole)


def test_what_is_left_out_is_counted_once(tmp_path, monkeypatch):
    stage = stage_of("llava", tmp_path, of_many_lengths(tmp_path / "pictures", 10), teacher=False, terms={"cross_entropy": 1})
    stage.dataset.skips.allowed = 1
    broken, load = stage.dataset.samples[0].images[0].key, Picture.load if hasattr(Picture, "load") else None
    assert load is not None
    refused = type(stage.dataset.samples[0].images[0])
    kept = refused.load

    def refuse(self, *given, **named):
        if self.key == broken:
            raise ImageError("broken")
        return kept(self, *given, **named)

    monkeypatch.setattr(refused, "load", refuse)
    pairs = [stage.dataset[n] for n in range(6)]
    batches = ByTokens(stage.dataset.collator, 200)(pairs)["batch"]
    assert len(batches) > 1 and sum(len(batch.skipped) for batch in batches) == 1
    assert sorted(name for batch in batches for name in batch.student.ids) == [f"s{n}" for n in range(1, 6)]


def test_the_plan_tells_how_many_there_are(tmp_path):
    stage = stage_of("llava", tmp_path, of_many_lengths(tmp_path / "pictures", 10))
    pairs = [stage.dataset[n] for n in range(10)]
    assert "about 1 a step" in count_line(pairs, 8, 10**6)
    assert "about 8 a step; 10 of 10 samples looked at are longer" in count_line(pairs, 8, 1)


def test_wrong_keys_are_refused():
    with pytest.raises(ValueError, match="give either `micro_batch_size` or `micro_batch_tokens`"):
        OptimiserSpec(micro_batch_size=2, micro_batch_tokens=100)
    with pytest.raises(ValueError, match="answers that are generated have no length before the step"):
        StageSpec(
            data=[{"format": "jsonl"}], terms={"forward_kl": 1}, steps=1, answers={"student": 1},
            optimiser={"micro_batch_tokens": 100},
        )  # fmt: skip
