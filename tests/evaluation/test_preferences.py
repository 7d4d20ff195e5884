"""Preference accuracy on pairs, against log-probabilities of the whole softmax."""

import dataclasses
import json

import pytest
import torch
from tiny import tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.cli import main
from mmkd.data.preference import REJECTED, rejected_of
from mmkd.evaluation.preferences import preference_accuracy

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def pairs(tmp_path):
    samples = tiny_samples(tmp_path, 6)
    others = ("C no", "round square no", "left of no")
    return [dataclasses.replace(s, meta={REJECTED: others[i % 3]}) for i, s in enumerate(samples)]


def plain_log_prob(tower, sample):
    """Sum over the answer's tokens, from the model's own logits."""
    inputs = tower.prepare([sample])
    with torch.no_grad():
        hidden = tower.read(inputs, tower.see(inputs))
        log_probs = tower.head(hidden)[..., : tower.vocabulary].double().log_softmax(-1)
    where = inputs.response
    return log_probs[where].gather(1, inputs.targets[where][:, None]).sum().item()


def test_accuracy_is_that_of_the_plain_log_probabilities(pairs, tmp_path):
    student, teacher = (tiny_tower(seed, width, tokenizer=TOKENIZER).freeze() for seed, width in ((1, 16), (2, 32)))
    found = preference_accuracy(student, teacher, pairs, tmp_path / "cache", batch_size=4)
    own = [[plain_log_prob(student, s) for s in (pair, rejected_of(pair))] for pair in pairs]
    reference = [[plain_log_prob(teacher, s) for s in (pair, rejected_of(pair))] for pair in pairs]
    margins = [(a - c) - (b - d) for (a, b), (c, d) in zip(own, reference, strict=True)]
    assert found["pairs"] == 6
    assert found["margin"] == pytest.approx(sum(margins) / 6, rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    assert found["likelier"] == pytest.approx(sum(a > b for a, b in own) / 6)
    assert found["margin_ci95"][0] <= found["margin"] <= found["margin_ci95"][1]


def test_a_model_prefers_nothing_over_itself(pairs, tmp_path):
    tower = tiny_tower(1, tokenizer=TOKENIZER).freeze()
    found = preference_accuracy(tower, tower, pairs, tmp_path / "cache")
    assert found["accuracy"] == 0 and found["margin"] == 0


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    row = {"prompt": "What is it?", "chosen": "red", "rejected": "green round"}
    lines = [row | {"images": [sample.images[0].name]} for sample in tiny_samples(tmp_path, 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed, name in ((1, "student"), (2, "teacher")):
        tiny_tower(seed, tokenizer=TOKENIZER).save(tmp_path / name)
    arguments = ["--reference", str(tmp_path / "teacher"), "--pairs", str(tmp_path / "pairs.jsonl"), "--data-root", str(tmp_path)]
    options = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "found.json")]
    assert main(["preferences", str(tmp_path / "student"), *arguments, *options]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "found.json").read_text()) and shown["pairs"] == 2
