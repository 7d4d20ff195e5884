"""Likelihoods of answers, choices and references, against the model's own forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmkd.data.samples import Turn
from mmkd.errors import TowerError
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.sample.sample_set import write_sample_set
from mmkd.towers import answering
from mmkd.towers.likelihood import TEMPERATURES, Likelihood, log_probabilities, logits_of
from mmkd.towers.tower import Tower
from tests.tiny import FAMILIES, tiny_family, tiny_samples, tiny_tower

TOKENS = 6


def forward(tower: Tower, sample, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits at the rows that predict an answer, and its tokens."""
    inputs = tower.prepare([replace(sample, turns=(*sample.prompt_turns, Turn("assistant", answer)))])
    with torch.no_grad():
        logits = tower.model.eval()(**tower.arguments(inputs)).logits[0].double()
    rows = inputs.response[0].nonzero()[:, 0]
    return logits[rows], inputs.targets[0, rows]


def expected(tower: Tower, sample, answer: str) -> list[float]:
    logits, ids = forward(tower, sample, answer)
    return [float(torch.log_softmax(logits / t, -1).gather(-1, ids[:, None]).sum()) for t in TEMPERATURES]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tower(request) -> Tower:
    return tiny_tower(language=request.param)


def test_temperatures_hold_one_and_are_in_order() -> None:
    assert list(TEMPERATURES) == sorted(TEMPERATURES) and min(abs(t - 1) for t in TEMPERATURES) < 1e-9
    assert TEMPERATURES[0] < 0.4 and TEMPERATURES[-1] > 10


def test_log_probabilities_at_all_temperatures() -> None:
    torch.manual_seed(0)
    logits, ids = 9 * torch.randn(5, 300), torch.arange(5)
    wanted = torch.stack([torch.log_softmax(logits.double() / t, -1)[ids, ids] for t in TEMPERATURES], -1)
    torch.testing.assert_close(log_probabilities(logits, ids).double(), wanted, rtol=1e-4, atol=1e-4)


def test_words_and_references_are_the_models_own(tower: Tower, tmp_path: Path) -> None:
    samples = tiny_samples(tmp_path, 5, two_images=1)
    plain = tower.answer(samples, max_new_tokens=TOKENS)
    references = ["red", "left of", None, "A", "green", "blue"]
    texts, found = tower.answer_with_likelihood(samples, [None] * 6, references, max_new_tokens=TOKENS)
    assert texts == plain
    for sample, reference, one in zip(samples, references, found, strict=True):
        assert one.choices is None and len(one.own) == len(TEMPERATURES)
        if reference is None:
            assert one.reference is None
        else:
            assert one.reference == pytest.approx(expected(tower, sample, reference), abs=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_references_of_other_families_are_read_as_in_training(name: str, tmp_path: Path) -> None:
    """PaliGemma reads its prompt in both directions, and must not so read the answer."""
    tower, samples = tiny_family(name), tiny_samples(tmp_path, 2)
    _, found = tower.answer_with_likelihood(samples, [None] * 2, ["red", "left of"], max_new_tokens=TOKENS)
    for sample, reference, one in zip(samples, ["red", "left of"], found, strict=True):
        inputs = tower.prepare([replace(sample, turns=(*sample.prompt_turns, Turn("assistant", reference)))])
        with torch.no_grad():
            logits = logits_of(tower, tower.read(inputs, tower.see(inputs))[0, inputs.response[0]])
        wanted = log_probabilities(logits, inputs.targets[0, inputs.response[0]]).sum(0)
        assert one.reference == pytest.approx(wanted.tolist(), abs=5e-3)


def test_an_answer_that_is_the_reference_costs_no_pass(tmp_path: Path, monkeypatch) -> None:
    write_sample_set(tmp_path, sizes={"train": 1, "val": 1, "test": 2})
    card = load_benchmark("sample_textvqa")
    samples = [card.render(question) for question in card.read(tmp_path)]
    tower = Tower.load("models/sample-teacher")
    texts = tower.answer(samples, max_new_tokens=16)
    other = [n == 1 for n in range(len(samples))]
    references = ["zzz" if wrong else text for wrong, text in zip(other, texts, strict=True)]
    asked, of_words = [], answering.of_words
    monkeypatch.setattr(answering, "of_words", lambda *given: asked.append(len(given[3])) or of_words(*given))
    _, found = tower.answer_with_likelihood(samples, [None] * len(samples), references, max_new_tokens=16)
    assert asked == [1]
    for sample, reference, one, wrong in zip(samples, references, found, other, strict=True):
        assert (one.own == one.reference) is not wrong
        assert one.reference == pytest.approx(expected(tower, sample, reference), abs=2e-3)


def test_logits_of_choices_by_generation_and_by_one_pass(tower: Tower, tmp_path: Path) -> None:
    samples, options = tiny_samples(tmp_path, 4), [["A", "B", "C"]] * 4
    _, by_words = tower.answer_with_likelihood(samples, options, [None] * 4, max_new_tokens=2)
    best, by_pass = tower.choose_with_likelihood(samples, options)
    assert best == tower.choose(samples, options)
    for sample, place, one, other in zip(samples, best, by_words, by_pass, strict=True):
        ids = [tower.answer_tokens(sample, letter) for letter in "ABC"]
        shared = next(n for n, tokens in enumerate(zip(*ids, strict=True)) if len(set(tokens)) > 1)
        logits, _ = forward(tower, sample, "A")
        wanted = [float(logits[shared, own[shared]]) for own in ids]
        assert other.choices == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        assert max(range(3), key=other.choices.__getitem__) == place
        assert one.choices == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_logits_that_no_rule_explains_leave_likelihoods_out(tmp_path: Path, monkeypatch) -> None:
    tower, samples = tiny_tower(), tiny_samples(tmp_path, 2)

    def no_rule(self):
        raise TowerError("no rule")

    monkeypatch.setattr(type(tower), "logit_rule", property(no_rule))
    best, found = tower.choose_with_likelihood(samples, [["A", "B"]] * 2)
    assert best == tower.choose(samples, [["A", "B"]] * 2) and found == [Likelihood()] * 2
    _, found = tower.answer_with_likelihood(samples, [None] * 2, ["red"] * 2, max_new_tokens=3)
    assert [one.reference for one in found] == [None, None]


def test_what_is_not_finite_is_not_kept() -> None:
    assert Likelihood([1.0, -math.inf], [math.nan], [-0.123456]).known() == {"reference": [-0.1235]}
