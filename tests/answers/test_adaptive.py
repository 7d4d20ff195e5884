"""DistiLLM's adaptive off-policy part: when the student's share rises, which answers come again, and that nothing is lost."""

import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower, weights_of
from transformers import TrainerCallback

from mmkd.answers.adaptive import AdaptiveAnswers
from mmkd.errors import DataError
from mmkd.train.spec import StageSpec

TOKENIZER = tiny_tokenizer()
KL = {"kl": {"kind": "forward_kl"}}
SHORT = {"max_new_tokens": 5, "held_out": 1}


def stage_of(samples, answers, **keys):
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    return tiny_stage(student, teacher, samples, KL, {"adaptive": SHORT | answers}, **keys)


def replay(**options):
    return AdaptiveAnswers(**options).memory(40, 0)


def test_the_share_rises_where_the_loss_does_not_fall_and_ends_at_one():
    memory, phi, lowest = replay(rise=0.3), 0.0, None
    for loss in (2.0, 1.5, 1.6, 1.4, 1.4, 1.9, 1.0, 5.0, 5.0):
        memory.measured(loss)
        if lowest is not None and loss >= lowest:
            phi = min(1.0, phi + 0.3)
        lowest = loss if lowest is None else min(lowest, loss)
        assert memory.share(0.5) == pytest.approx(phi)
    assert memory.share(0.0) == 1.0


def test_a_small_fall_is_none_within_the_tolerance():
    memory = replay(tolerance=0.1)
    for loss in (2.0, 1.95, 1.7):
        memory.measured(loss)
    assert memory.share(0) == pytest.approx(0.1)


def test_of_its_share_what_lies_beyond_one_less_progress_comes_again_once_there_is_enough():
    memory = replay(capacity=3)
    memory.measured(1.0)
    memory.keep([(7, [1]), (8, [2])])
    assert memory.recalled(0.99, 5, 1.0) is None  # not full yet: the student answers anew
    memory.keep([(9, [3]), (7, [4])])
    assert [memory.recalled(0.99, draw, 1.0) for draw in range(3)] == [(8, [2]), (9, [3]), (7, [4])]
    again = [memory.recalled(place / 1000, 0, 0.3) is not None for place in range(1000)]
    assert sum(again) == 300 and not any(again[:700])
    assert memory.recalled(0.99, 0, 0.0) is None


def test_what_it_carries_survives_a_checkpoint(tmp_path):
    memory, other = replay(capacity=3), replay(capacity=3)
    for loss in (1.0, 2.0):
        memory.measured(loss)
    memory.keep([(n, [n, n + 1]) for n in range(5)])
    other.restore(json.loads(json.dumps(memory.state())))
    assert other.state() == memory.state() and other.share(0) == pytest.approx(0.1)
    assert [other.recalled(1, draw, 1) for draw in range(3)] == [memory.recalled(1, draw, 1) for draw in range(3)]
    stage = stage_of(tiny_samples(tmp_path, 10), {})
    with pytest.raises(DataError, match=r"answers.json does not hold what"):
        stage.answers.load(tmp_path)


def step(stage, pairs, number=0, progress=0.0, cut=2):
    """A step's micro-batches of `cut` samples."""
    parts = [pairs[start : start + cut] for start in range(0, len(pairs), cut)]
    stage.answers.begin(number, progress)
    return [inputs["batch"] for inputs in stage.answers.take(iter([{"batch": SimpleNamespace(pairs=p)} for p in parts]), 99)]


def said(batches):
    """By row of the batches, (id, answer, whether the student's own)."""
    inputs = [batch.student for batch in batches]
    return [(name, row[row >= 0].tolist(), own) for one in inputs
            for name, row, own in zip(one.ids, one.targets, one.own or [False] * len(one.ids), strict=True)]  # fmt: skip


def test_answers_come_again_with_their_own_prompts_and_however_a_step_is_cut(tmp_path):
    samples = tiny_samples(tmp_path, 12)
    found = {}
    for cut in (4, 1):
        stage = stage_of(samples, {"start": 1.0, "capacity": 4})
        memory = stage.answers.memories["adaptive"]
        memory.measured(1.0)
        pairs = [stage.dataset[n] for n in range(12) if n not in memory.held_out][:4]
        fresh = said(step(stage, pairs, 0, 0.0, cut))
        kept = memory.state()["kept"]
        assert sorted(kept) == sorted((pair.index, ids) for pair, (_, ids, _) in zip(pairs, fresh, strict=True))
        others = [stage.dataset[n] for n in range(12) if n not in memory.held_out][4:8]
        again = step(stage, others, 1, 1.0, cut)
        assert memory.state()["kept"] == kept and stage.answers.observed()["adaptive_recalled"] == (4, 4)
        known = {(samples[index].id, tuple(ids)) for index, ids in kept}
        assert {(name, tuple(ids)) for name, ids, _ in said(again)} <= known and all(own for *_, own in said(again))
        prompt = {samples[index].id: stage.student.encode(samples[index], with_answer=False).input_ids for index, _ in kept}
        for batch in again:
            for row, name in zip(batch.student.input_ids, batch.student.ids, strict=True):
                width = len(prompt[name])
                assert any(torch.equal(row[at : at + width], prompt[name]) for at in range(len(row) - width + 1))
        found[cut] = (fresh, kept, said(again))
    assert found[4] == found[1]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    stage = stage_of(tiny_samples(tmp_path, 20), {"held_out": 2})
    memory = stage.answers.memories["adaptive"]
    memory.measured(1.0)
    assert len(memory.held_out) == 2
    batches = step(stage, [stage.dataset[n] for n in range(20)], cut=5)
    seen = {name for name, _, own in said(batches) if not own}
    assert len(said(batches)) == 20 and seen == {f"s{n}" for n in range(20) if n not in memory.held_out}


def stop_after(number):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == number:
                control.should_save = control.should_training_stop = True

    return Stop()


def trained(folder, samples, options, resume=None, until=None, **keys):
    stage = stage_of(samples, options, steps=6, save_every=10, log_every=1, **keys)
    trainer = tiny_stage_trainer(folder, stage)
    if until is not None:
        trainer.add_callback(stop_after(until))
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(stage.student), stage.answers.memories["adaptive"].state()


@pytest.mark.parametrize("stopped", [2, 5])
def test_stopped_and_gone_on_is_undisturbed_to_the_bit(tmp_path, stopped):
    samples = tiny_samples(tmp_path / "pictures", 20)
    options = {"start": 0.6, "rise": 0.2, "tolerance": 1e3, "every": 2, "capacity": 3}
    whole, state = trained(tmp_path / "a", samples, options)
    trained(tmp_path / "b", samples, options, until=stopped)
    again, other = trained(tmp_path / "b", samples, options, resume=str(tmp_path / "b" / "stages" / f"checkpoint-{stopped}"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.dumps(state) == json.dumps(other) and state["phi"] == 1.0 and len(state["kept"]) == 3
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [round(row["adaptive_share"], 6) for row in log] == [0.6, 0.6, 0.8, 0.8, 1.0, 1.0]
    assert sum(row["adaptive_recalled"] for row in log) > 0


def test_a_loss_that_falls_leaves_all_answers_to_the_data(tmp_path, monkeypatch):
    losses = iter([9.0 - n for n in range(9)])
    monkeypatch.setattr("mmkd.train.measured.answer_losses", lambda tower, samples: [(next(losses), 1)])
    _, state = trained(tmp_path, tiny_samples(tmp_path / "pictures", 12), {"every": 1})
    assert state["phi"] == 0 and state["kept"] == [] and state["lowest"] == 3.0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["generated_share"] for row in log] == [0.0] * 6


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"adaptive": 0.5}, "adaptive finds its share itself; take `share` out"),
        ({"adaptive": {"share": 0.5}}, "adaptive finds its share itself"),
        ({"adaptive": {}, "data": 0.5}, "take `data` out"),
        ({"adaptive": {"rise": 0}}, "rise"),
        ({"adaptive": {"capasity": 4}}, "capacity"),
        ({"adaptive": {}, "student": 0.5}, "add up to more than 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(answers, words):
    with pytest.raises(ValidationError, match=words):
        StageSpec(data=[{"format": "jsonl"}], terms=KL, steps=2, answers=answers)


def test_ten_samples_at_least(tmp_path):
    with pytest.raises(DataError, match="there are 9; give ten at least"):
        stage_of(tiny_samples(tmp_path, 9), {})
    spec = StageSpec(data=[{"format": "jsonl"}], terms=KL | {"cross_entropy": 1}, steps=2, answers={"adaptive": {}})
    assert spec.generates and [t.positions for t in spec.build_terms()] == ["response", "given"]
