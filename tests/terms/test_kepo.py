"""KEPO: the group's advantage, the gate of distillation and hints, against float64 computations."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower

from mmkd.answers import Asked
from mmkd.answers.hinted import HintedAnswers
from mmkd.answers.student import StudentAnswers
from mmkd.data.samples import Question, Turn
from mmkd.registry import register
from mmkd.terms.reward import Scorer, advantages, question_of
from mmkd.terms.spec import TermSpec
from mmkd.towers.sampling import text_of

TOKENIZER = tiny_tokenizer()
GROUP = {"student": {"share": 1, "max_new_tokens": 4, "samples": 4}}


@register("metrics", "kepo_even")
def even(prediction, references):
    """1.0 for an answer of evenly many characters."""
    return float(len(prediction) % 2 == 0)


@register("metrics", "kepo_never")
def never(prediction, references):
    """0.0 always."""
    return 0.0


@register("metrics", "kepo_always")
def always(prediction, references):
    """1.0 always."""
    return 1.0


def step(folder, terms, answers=GROUP):
    """(loss, log, gradient of the head, towers, batch) of one micro-batch of the student's answers."""
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    stage = tiny_stage(student, teacher, tiny_samples(folder, 3), terms, answers)
    batch = stage.batch_of(2)
    loss, log = stage.distiller(batch)
    loss.backward()
    return loss, log, student.head.weight.grad.clone(), (student, teacher), batch


def whole(tower, inputs):
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
    return out.double()[..., : len(TOKENIZER)].log_softmax(-1)


def test_advantages_are_those_of_each_group():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    found = advantages(reward, ["a", "b", "a", "c", "c", "b", "a"])
    a = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    expected = (a - 0.5) / (0.5 + 1e-4)  # the deviation of 1, 0, 0.5 is 0.5
    torch.testing.assert_close(found[[0, 2, 6]], expected, rtol=1e-12, atol=0)
    assert found[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(advantages(reward, ["a"] * 7, by_deviation=False), reward - reward.mean())


def test_the_groups_loss_and_gradient_are_those_of_a_plain_computation(tmp_path):
    loss, log, found, (student, _), batch = step(tmp_path, {"g": {"kind": "group_reward", "metric": "kepo_even"}})
    inputs = batch.student
    student.model.zero_grad()
    said = whole(student, inputs).gather(-1, inputs.targets.clamp(min=0)[..., None])[..., 0]
    texts = [text_of(TOKENIZER, inputs.targets[n][inputs.response[n]].tolist()).strip() for n in range(len(inputs.ids))]
    reward = [float(len(text) % 2 == 0) for text in texts]
    groups = [name.split(" draw ")[0] for name in inputs.ids]
    assert len(set(groups)) == 2 and 0 < sum(reward) < len(reward)
    total = 0.0
    for n, group in enumerate(groups):
        own = torch.tensor([r for r, other in zip(reward, groups, strict=True) if other == group], dtype=torch.float64)
        advantage = float((reward[n] - own.mean()) / (own.std() + 1e-4))
        total = total - advantage * said[n][inputs.response[n]].sum()
    expected = total / inputs.response.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, student.head.weight.grad, rtol=1e-4, atol=1e-6)
    score = log["g_score"]
    assert (score[0] / score[1]).item() == pytest.approx(sum(reward) / len(reward))


def test_the_gate_keeps_the_rows_of_rewarded_answers(tmp_path):
    loss, _, found, (student, teacher), batch = step(tmp_path, {"g": {"kind": "rewarded_reverse_kl", "metric": "kepo_even"}})
    inputs = batch.student
    student.model.zero_grad()
    q, p = whole(student, inputs), whole(teacher, inputs).detach()
    kl = (q.exp() * (q - p)).sum(-1)
    rows = [inputs.targets[n][inputs.response[n]].tolist() for n in range(len(inputs.ids))]
    opened = [len(text_of(TOKENIZER, ids).strip()) % 2 == 0 for ids in rows]
    assert 0 < sum(opened) < len(opened)
    expected = sum(kl[n][inputs.response[n]].sum() for n, is_open in enumerate(opened) if is_open) / inputs.response.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, student.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_gate_that_is_always_open_is_on_policy_distillation_and_one_that_never_is_grpo(tmp_path):
    grpo = {"g": {"kind": "group_reward", "metric": "kepo_even"}}
    opened = step(tmp_path, {"k": {"kind": "rewarded_reverse_kl", "metric": "kepo_always"}})
    plain = step(tmp_path, {"k": {"kind": "reverse_kl", "positions": "generated"}})
    assert opened[0] == plain[0] and torch.equal(opened[2], plain[2])
    shut = step(tmp_path, grpo | {"k": {"kind": "rewarded_reverse_kl", "metric": "kepo_never"}})
    alone = step(tmp_path, grpo)
    assert shut[0].item() == pytest.approx(alone[0].item(), rel=1e-6)
    torch.testing.assert_close(shut[2], alone[2], rtol=1e-5, atol=1e-8)


def test_equal_rewards_leave_only_distillation(tmp_path):
    loss, _, gradient, *_ = step(tmp_path, {"g": {"kind": "group_reward", "metric": "kepo_always"}})
    assert loss == 0 and not gradient.any()


def test_a_stage_learns_by_both_and_data_answers_count_nothing(tmp_path):
    terms = {"cross_entropy": 1, "g": {"kind": "group_reward", "metric": "kepo_even"},
             "k": {"kind": "rewarded_reverse_kl", "metric": "kepo_even"}}  # fmt: skip
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    before = student.head.weight.detach().clone()
    answers = {"student": {"share": 0.5, "max_new_tokens": 3, "samples": 2}, "data": 0.5}
    tiny_stage_trainer(tmp_path, tiny_stage(student, teacher, tiny_samples(tmp_path, 6), terms, answers)).train()
    assert not torch.equal(before, student.head.weight) and "g_score" in (tmp_path / "log.jsonl").read_text()


def test_letters_are_scored_by_the_answer_that_is_trained_and_others_by_their_references(tmp_path):
    (sample,) = tiny_samples(tmp_path, 1)
    letter = replace(sample, turns=(*sample.prompt_turns, Turn("assistant", "B")))
    letter.meta["question"] = Question("q", "?", answer_index=1, choices=("red", "blue"), references=("blue",))
    assert Scorer("accuracy")("B", question_of(letter)) == 1 and Scorer("accuracy")("blue", question_of(letter)) == 0
    words = replace(sample, meta={"question": Question("q", "?", references=("red", "scarlet"))})
    assert Scorer()(" Scarlet ", question_of(words)) == 1 and Scorer()("blue", question_of(words)) == 0


@pytest.mark.parametrize("options", [{"metric": "exactmatch"}, {"parser": "identty"}])
@pytest.mark.parametrize("kind", ["group_reward", "rewarded_reverse_kl"])
def test_unknown_scorers_are_named(kind, options):
    with pytest.raises(ValidationError, match="there is no .*; did you mean"):
        TermSpec(kind=kind, **options)


# ---- hints -------------------------------------------------------------------------------------------------------------


def asked(student, samples, draws):
    return [Asked(student.encode(s, with_answer=False), tuple(r.key for r in s.images), 100 * n + draw, {}, s)
            for n, s in enumerate(samples) for draw in range(draws)]  # fmt: skip


def hinted(**options):
    return HintedAnswers(**{"max_new_tokens": 4, "samples": 3, "hint": "{prompt} {answer}"} | options)


def test_only_a_group_without_a_reward_is_asked_again_and_with_the_hint(tmp_path, monkeypatch):
    student, samples = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_samples(tmp_path, 3)
    prompts = asked(student, samples, 3)
    calls = []
    plain = StudentAnswers.answer

    def watched(self, tower, given):
        calls.append(list(given))
        return plain(self, tower, given)

    monkeypatch.setattr(StudentAnswers, "answer", watched)
    solved = hinted(metric="kepo_always").answer(student, prompts)
    assert len(calls) == 1 and solved == plain(hinted(), student, prompts)
    calls.clear()
    assert hinted(metric="kepo_never", tries=2).answer(student, prompts) == solved and len(calls) == 3
    told = Turn("user", f"{samples[0].turns[0].text} {samples[0].answer}", 1)
    hint = student.encode(replace(samples[0], turns=(told,)), with_answer=False)
    assert torch.equal(calls[1][0].prompt.input_ids, hint.input_ids) and calls[1][0].seed != calls[2][0].seed


def test_the_first_rewarded_try_takes_the_place_of_all_answers_of_its_group(tmp_path):
    student, samples = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_samples(tmp_path, 6)
    prompts = asked(student, samples, 1)
    before = StudentAnswers(max_new_tokens=4).answer(student, prompts)
    after = hinted(samples=1, metric="kepo_even", tries=3).answer(student, prompts)
    right = [len(text_of(TOKENIZER, ids).strip()) % 2 == 0 for ids in before]
    assert not all(right) and any(right)
    assert all(old == new for old, new, is_right in zip(before, after, right, strict=True) if is_right)
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed and all(len(text_of(TOKENIZER, ids).strip()) % 2 == 0 for ids in changed)


@pytest.mark.parametrize("options", [{"hint": "no field"}, {"metric": "unknown"}, {"threshold": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError):
        hinted(**options)
