"""DCKD: an aligned teacher's distributions on chosen and on rejected answers, against each answer read by itself."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower
from torch.nn import functional as F

from mmkd.data.preference import REJECTED, rejected_of
from mmkd.errors import DataError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.train.spec import StageSpec

TOKENIZER = tiny_tokenizer()
ANSWERS = {"rejected": {"share": 1}}


def terms(sft=0.5, chosen=1.0, rejected=0.7):
    return {
        "cross_entropy": sft,
        "chosen": {"kind": "forward_kl", "positions": "given", "weight": chosen},
        "rejected": {"kind": "forward_kl", "positions": "generated", "weight": rejected},
    }


def pairs(folder):
    return [replace(sample, meta={REJECTED: f"{sample.answer} round"}) for sample in tiny_samples(folder, 4, text_only=1)]


def towers():
    return tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)


def log_probs(tower, sample):
    """Of one answer the rows of log-probabilities and its tokens."""
    inputs = tower.collate([tower.encode(sample)])
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits.double()
    return out[inputs.response].log_softmax(-1), inputs.targets[inputs.response]


def test_the_loss_is_that_of_chosen_and_rejected_answers_read_apart(tmp_path):
    student, teacher = towers()
    samples = pairs(tmp_path)
    stage = tiny_stage(student, teacher, samples, terms(), ANSWERS)
    batch = stage.batch_of(5)
    assert batch.student.own == [False, True] * 5
    loss, log = stage.distiller(batch)
    loss.backward()
    found = student.head.weight.grad.clone()
    student.model.zero_grad()
    total = {"chosen": [], "rejected": [], "cross_entropy": []}
    for sample in samples:
        for name, one in (("chosen", sample), ("rejected", rejected_of(sample))):
            (q, targets), (p, _) = log_probs(student, one), log_probs(teacher, one)
            total[name].append(F.kl_div(q, p.detach(), log_target=True, reduction="none").sum(-1))
            if name == "chosen":
                total["cross_entropy"].append(F.nll_loss(q, targets, reduction="none"))
    means = {name: torch.cat(rows).mean() for name, rows in total.items()}
    expected = 0.5 * means["cross_entropy"] + means["chosen"] + 0.7 * means["rejected"]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, mean in means.items():
        assert (log[name][0] / log[name][1]).item() == pytest.approx(mean.item(), rel=1e-5), name
    torch.testing.assert_close(found, student.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_without_the_rejected_half_it_is_distillation_on_chosen_answers(tmp_path):
    samples = pairs(tmp_path)
    student, teacher = towers()
    both = tiny_stage(student, teacher, samples, terms(), ANSWERS)
    _, log = both.distiller(both.batch_of(5))
    plain = tiny_stage(student, teacher, samples, {"cross_entropy": 0.5, "chosen": {"kind": "forward_kl"}})
    _, alone = plain.distiller(plain.batch_of(5))
    for name in ("cross_entropy", "chosen"):
        assert log[name][0].item() == pytest.approx(alone[name][0].item(), rel=1e-6) and log[name][1] == alone[name][1]


def test_an_equal_teacher_makes_both_divergences_nothing(tmp_path):
    student, _ = towers()
    stage = tiny_stage(student, towers()[0], pairs(tmp_path), terms(), ANSWERS)
    _, log = stage.distiller(stage.batch_of(5))
    assert log["chosen"][0].abs() < 1e-4 and log["rejected"][0].abs() < 1e-4 and log["rejected"][1] > 0


def test_a_stage_trains_and_a_share_leaves_some_without(tmp_path):
    student, teacher = towers()
    stage = tiny_stage(student, teacher, pairs(tmp_path / "p"), terms(), {"rejected": {"share": 0.5}, "data": 0.5}, steps=2)
    tiny_stage_trainer(tmp_path, stage).train()
    assert 0 < sum(stage.batch_of(5).student.own or [0]) < 5 and '"rejected"' in (tmp_path / "log.jsonl").read_text()


def test_data_without_pairs_and_terms_that_would_teach_the_rejected_are_refused(tmp_path):
    student, teacher = towers()
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 4), terms(), ANSWERS)
    with pytest.raises(DataError, match="one answer, not a chosen and a rejected one"):
        stage.batch_of(4)
    rows = [{"id": str(n), "question": "what?", "answer": "red"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"title": "t", "output": "runs/x", "teacher": {"model": "m"}, "student": {"model": "s"}, "stages": {"only": {
        "data": [{"format": "jsonl", "root": str(tmp_path), "text_only": True}], "steps": 1, "terms": terms(),
        "answers": ANSWERS}}}  # fmt: skip
    recipe = validate(raw, "test", Recipe)
    with pytest.raises(DataError, match="one answer, not a chosen and a rejected one"):  # before anything is trained
        stage_samples(recipe, recipe.stages["only"])
    with pytest.raises(ValidationError, match="two answers of the data"):
        StageSpec(data=[{"format": "jsonl"}], steps=2, terms=terms() | {"dpo": 1}, answers=ANSWERS)
    spec = StageSpec(data=[{"format": "jsonl"}], steps=2, terms=terms(), answers={"student": {"share": 1, "beside": True}})
    assert [t.positions for t in spec.build_terms()] == ["given", "given", "generated"]
