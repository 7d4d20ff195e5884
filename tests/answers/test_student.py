"""On-policy training: what the student says, that teachers score the very tokens, and that it is the same whatever happens."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import VISIONS, tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower, weights_of
from torch.nn import functional as F

from mmkd.answers import Asked
from mmkd.answers.student import StudentAnswers
from mmkd.engine.positions import counts_by_name, rows_at
from mmkd.errors import DataError
from mmkd.registry import registry
from mmkd.teachers.live import LiveTeacher
from mmkd.towers.assemble import train_tokenizer
from mmkd.towers.inputs import IGNORE
from mmkd.train.spec import StageSpec

TOKENIZER = tiny_tokenizer()
KL = {"kl": {"kind": "forward_kl"}}
HALF = {"student": {"share": 0.5, "max_new_tokens": 5}, "data": 0.5}
OWN = {"student": {"share": 1, "max_new_tokens": 6}}


def towers(**teacher):
    return tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, **{"tokenizer": TOKENIZER} | teacher)


def asked(tower, samples, seed=7):
    return [
        Asked(tower.encode(s, with_answer=False), tuple(ref.key for ref in s.images), seed + n) for n, s in enumerate(samples)
    ]


def next_logits(tower, prompt, ids):
    """Logits behind a prompt and some tokens, the ordinary way."""
    inputs = tower.collate([prompt])
    text = torch.cat([inputs.input_ids, torch.tensor([ids], dtype=torch.long)], dim=1)
    return tower.model(input_ids=text, attention_mask=torch.ones_like(text), **inputs.pixels).logits[0, -1].double()


def test_each_token_is_drawn_by_its_samples_own_number_from_the_models_distribution(tmp_path):
    tower, _ = towers()
    tower.model.eval()
    samples = tiny_samples(tmp_path, 5, text_only=1)
    how = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "max_new_tokens": 5}
    prompts = asked(tower, samples)
    answers = StudentAnswers(**how).answer(tower, prompts)
    for one, ids in zip(prompts, answers, strict=True):
        draws = torch.rand(5, generator=torch.Generator().manual_seed(one.seed), dtype=torch.float64)
        for place, token in enumerate(ids):
            with torch.no_grad():
                logits = next_logits(tower, one.prompt, ids[:place])[: len(TOKENIZER)] / 0.7
            logits[tower.image_token_id] = -torch.inf
            likeliest = logits.topk(9).values[-1]
            logits[logits < likeliest] = -torch.inf
            order = logits.argsort(descending=True)
            mass = logits.softmax(-1)[order].cumsum(-1)
            logits[order[1:][mass[:-1] >= 0.9]] = -torch.inf  # the one that passes the border stays
            up_to = logits.softmax(-1).cumsum(-1)
            assert token == int((up_to <= draws[place]).sum())


def test_an_answer_is_the_same_in_any_batch_and_leaves_the_process_generator_alone(tmp_path):
    tower, _ = towers()
    samples = tiny_samples(tmp_path, 6, text_only=2)
    source, prompts = StudentAnswers(max_new_tokens=8), asked(tower, samples)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = source.answer(tower, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    assert together == [source.answer(tower, [one])[0] for one in prompts]
    assert together == source.answer(tower, prompts[::-1])[::-1]
    assert len({tuple(ids) for ids in together}) > 1


def test_temperature_zero_is_greedy(tmp_path):
    tower, _ = towers()
    samples = tiny_samples(tmp_path, 4)
    ids = StudentAnswers(temperature=0, max_new_tokens=4).answer(tower, asked(tower, samples))
    said = [TOKENIZER.decode(row, skip_special_tokens=True).strip() for row in ids]
    assert said == tower.answer(samples, max_new_tokens=4)


def micro_batch(stage, count=4):
    return stage.batch_of(count)


def test_teacher_and_student_read_the_same_generated_tokens_and_no_end_is_added(tmp_path):
    student, teacher = towers()
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 6), KL, OWN)
    batch = micro_batch(stage)
    own, other = batch.student, batch.teacher
    assert own is other  # one processor: one preparation
    ends = []
    for row in own.targets:
        said = row[row != IGNORE].tolist()
        assert 1 <= len(said) <= 6 and not set(said[:-1]) & student.stop_ids
        ends.append(said[-1] in student.stop_ids)
        assert len(said) == 6 or ends[-1]
    assert own.own == [True] * 4 and not own.given.any() and own.generated.sum() == counts_by_name(batch.counts)["response"]
    log = stage.answers.observed()
    assert log["generated_cut"] == (ends.count(False), 4) and log["generated_share"] == (4, 4)
    assert log["generated_length"][0] == int(own.response.sum())


def test_the_loss_is_that_of_a_plain_computation_on_the_generated_tokens(tmp_path):
    student, teacher = towers()
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 6, text_only=1), KL, OWN)
    batch = micro_batch(stage)
    loss, _ = stage.distiller(batch)
    rows = []
    for tower in (student, teacher):
        inputs = batch.student
        out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
        rows.append(out.logits.double()[inputs.response].log_softmax(-1))
    q, p = rows
    assert loss.item() == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5)


def test_in_a_mixture_cross_entropy_counts_the_answers_of_the_data_alone(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 8)
    stage = tiny_stage(student, teacher, samples, KL | {"cross_entropy": 1}, HALF)
    batch = micro_batch(stage, 8)
    inputs = batch.student
    assert 0 < sum(inputs.own) < 8
    _, log = stage.distiller(batch)
    given = rows_at(inputs, "given")
    logits = student.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits.double()
    total, count = log["cross_entropy"]
    assert total.item() == pytest.approx(F.cross_entropy(logits[given], inputs.targets[given], reduction="sum").item(), rel=1e-5)
    assert count == given.sum() and log["kl"][1] == inputs.response.sum()
    by_id = {s.id: s for s in samples}
    for row, own, name in zip(inputs.targets, inputs.own, inputs.ids, strict=True):
        if not own:
            assert TOKENIZER.decode(row[row >= 0], skip_special_tokens=True).strip() == by_id[name].answer


def test_positions_tell_both_kinds_apart_and_add_up(tmp_path):
    student, teacher = towers()
    terms = {name: {"kind": "forward_kl", "positions": name} for name in ("given", "generated", "response")}
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 8), terms, HALF)
    _, log = stage.distiller(micro_batch(stage, 8))
    sums = {name: total.item() for name, (total, _) in log.items()}
    assert sums["given"] + sums["generated"] == pytest.approx(sums["response"], rel=1e-6)
    assert log["given"][1] + log["generated"][1] == log["response"][1] and min(sums.values()) > 0


def test_several_answers_to_a_prompt(tmp_path):
    student, teacher = towers()
    answers = {"student": {"share": 1, "samples": 3, "max_new_tokens": 6}}
    batch = micro_batch(tiny_stage(student, teacher, tiny_samples(tmp_path, 4), KL, answers), 2)
    assert batch.student.ids == ["s0", "s0 draw 2", "s0 draw 3", "s1", "s1 draw 2", "s1 draw 3"]
    assert len({tuple(row.tolist()) for row in batch.student.targets[:3]}) > 1


def trained(folder, samples, terms=KL, answers=OWN, resume=None, until=None, steps=4, **keys):
    student, teacher = towers()
    stage = tiny_stage(student, teacher, samples, terms, answers, steps=steps, **keys)
    trainer = tiny_stage_trainer(folder, stage)
    if until is not None:
        trainer.add_callback(stop_after(until))
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(student), trainer


def stop_after(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                control.should_save = control.should_training_stop = True

    return Stop()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_share_of_zero_trains_the_numbers_of_the_data_to_the_bit(tmp_path):
    samples = tiny_samples(tmp_path / "pictures", 8)
    plain, _ = trained(tmp_path / "a", samples, answers=None)
    zero, _ = trained(tmp_path / "b", samples, answers={"student": 0, "data": 1})
    own, _ = trained(tmp_path / "c", samples)
    assert same(plain, zero) and not same(plain, own)


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_stopped_and_gone_on_is_undisturbed_to_the_bit(tmp_path, stopped):
    samples = tiny_samples(tmp_path / "pictures", 8)
    answers = {"student": {"share": {"start": 0.2, "end": 1.0}, "max_new_tokens": 5}}
    whole, _ = trained(tmp_path / "a", samples, answers=answers)
    trained(tmp_path / "b", samples, answers=answers, until=stopped)
    again, _ = trained(tmp_path / "b", samples, answers=answers, resume=str(tmp_path / "b" / "stages" / f"checkpoint-{stopped}"))
    assert same(whole, again)


def test_micro_batches_are_one_batch(tmp_path):
    samples = tiny_samples(tmp_path / "pictures", 8)
    one, _ = trained(tmp_path / "a", samples, optimiser={"micro_batch_size": 4})
    two, _ = trained(tmp_path / "b", samples, optimiser={"micro_batch_size": 1})
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_the_log_tells_length_and_shares(tmp_path):
    trained(tmp_path, tiny_samples(tmp_path / "pictures", 8))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["generated_share"] == 1 and 1 <= row["generated_length"] <= 6
        assert 0 <= row["generated_empty"] <= 1 and 0 <= row["generated_cut"] <= 1


def test_a_teacher_of_another_processor_reads_the_same_tokens_behind_its_own_prompt(tmp_path):
    student, teacher = towers(vision=VISIONS["vit"] | {"image_size": 24}, image_size=(24, 24))
    batch = micro_batch(tiny_stage(student, teacher, tiny_samples(tmp_path, 4), KL, OWN))
    own, other = batch.student, batch.teacher
    assert other is not own and other.input_ids.shape != own.input_ids.shape
    assert torch.equal(own.targets[own.response], other.targets[other.response]) and other.own == own.own


def test_a_teacher_of_another_tokenizer_reads_the_same_words(tmp_path):
    other = train_tokenizer(("white cat", "round table", "blue square", "green"), 290)
    student, teacher = towers(tokenizer=other)
    terms = {"spans": {"kind": "spans"}}
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 6), terms, {"student": {"share": 1, "max_new_tokens": 8}})
    batch = micro_batch(stage, 6)
    for mine, theirs in zip(batch.student.targets, batch.teacher.targets, strict=True):
        said = TOKENIZER.decode(mine[mine >= 0], skip_special_tokens=True)
        read = other.decode(theirs[theirs >= 0], skip_special_tokens=True)
        assert read.strip() == said.strip()
        cut = int(mine[mine >= 0][-1]) not in student.stop_ids
        assert cut != bool(len(theirs[theirs >= 0]) and int(theirs[theirs >= 0][-1]) in teacher.stop_ids)
    loss, _ = stage.distiller(batch)
    assert torch.isfinite(loss) and loss > 0


def test_an_answer_gets_what_room_the_longest_prompt_leaves(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 4)
    lengths = [len(student.encode(s, with_answer=False).input_ids) for s in samples]
    room = max(len(student.encode(s).input_ids) for s in samples)
    student.max_length, teacher.max_length = room + 8, room
    answers = {"student": {"share": 1, "max_new_tokens": 20}}
    batch = micro_batch(tiny_stage(student, LiveTeacher(teacher), samples, KL, answers))
    said = batch.student.response.sum(1).tolist()
    assert all(n <= room - length for n, length in zip(said, lengths, strict=True))


def test_a_cache_is_refused_since_it_has_not_seen_the_answers(tmp_path):
    class Cache(LiveTeacher):
        stored = True

        def storage(self):
            return "3 samples"

    student, teacher = towers()
    with pytest.raises(DataError, match="3 samples.*has not seen the answers"):
        tiny_stage(student, Cache(teacher), tiny_samples(tmp_path, 4), KL, OWN)


def test_an_answer_that_is_only_an_end_is_learned_and_counted_as_empty(tmp_path, monkeypatch):
    student, teacher = towers()
    end = min(student.stop_ids)
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 4), KL, OWN)
    monkeypatch.setattr(StudentAnswers, "answer", lambda self, student, asked: [[end] for _ in asked])
    batch = micro_batch(stage)
    assert batch.student.response.sum(1).tolist() == [1] * 4 and stage.answers.observed()["generated_empty"] == (4, 4)
    assert torch.isfinite(stage.distiller(batch)[0])


def test_no_answer_holds_a_picture_or_a_padding_row_of_the_head(tmp_path):
    student, _ = towers()
    student.model.resize_token_embeddings(len(TOKENIZER) + 40)
    head = student.head.weight
    with torch.no_grad():  # both far likelier than anything else
        hidden = head[5].clone()
        head[len(TOKENIZER) :] = 100 * hidden
        head[student.image_token_id] = 100 * hidden
    said = StudentAnswers(max_new_tokens=6, temperature=3.0).answer(student, asked(student, tiny_samples(tmp_path, 6)))
    assert all(0 <= token < len(TOKENIZER) and token != student.image_token_id for ids in said for token in ids)


def stage_spec(terms, answers, **keys):
    return StageSpec(data=[{"format": "jsonl"}], terms=terms, steps=2, answers=answers, **keys)


@pytest.mark.parametrize(
    ("terms", "answers", "words"),
    [
        (KL, {"studnt": 1}, "student"),
        (KL, {"student": 0.5}, "add up to 1"),
        (KL, {"student": {"temperature": 1}}, "needs a share"),
        (KL, {"student": {"share": 1, "temprature": 1}}, "temperature"),
        (KL, {"student": {"share": 1, "top_p": 0}}, "top_p"),
        (KL, {"student": 0.5, "data": {"share": 0.5, "top_k": 1}}, "data has no options"),
        (KL, {"student": {"share": {"start": 0, "end": 1}}, "data": 0.5}, "take `data` out"),
        ({"cross_entropy": 1}, {"student": 0.5, "data": 0.5}, "no term learns from the student's own answers"),
        (KL | {"cross_entropy": 1}, {"student": 1}, "give `data` a share"),
        (KL | {"tags": 1}, {"student": 0.5, "data": 0.5}, "tags takes answers for right"),
        (KL | {"cross_entropy": {"positions": "text"}}, {"student": 0.5, "data": 0.5}, "use positions: given"),
        ({"kl": {"kind": "forward_kl", "positions": "generated"}}, {"data": 1}, "all answers of this stage are the data's"),
        ({"dpo": 1}, {"student": 0.5, "data": 0.5}, "two answers of the data"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(terms, answers, words):
    with pytest.raises(ValidationError, match=words):
        stage_spec(terms, answers)


def test_the_short_form_stays_valid():
    assert stage_spec(KL, {"student": 0.5, "data": 0.5}).generates
    assert not stage_spec(KL, {"data": 1.0}).generates
    assert not stage_spec(KL, {"student": 0, "data": 1}).generates


def test_the_page_has_a_source_that_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "on_policy.md").read_text(encoding="utf-8")
    code = page.split("```python\n# my_answers.py\n")[1].split("```")[0]
    try:
        exec(compile(code, "my_answers", "exec"), {"__name__": "my_answers"})
        student, teacher = towers()
        stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 4), KL, {"echo": {"share": 1, "words": 2}})
        batch = micro_batch(stage)
        assert batch.student.response.sum(1).tolist() == [3] * 4
        with pytest.raises(ValidationError, match="wrds"):
            stage_spec(KL, {"echo": {"share": 1, "wrds": 2}})
    finally:
        registry("answers").remove("echo")
