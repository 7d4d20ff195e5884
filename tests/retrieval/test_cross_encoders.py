"""Cross-encoders: scores against the models' own forward passes, batching, and the table that keeps them."""

from __future__ import annotations

import pytest
import torch
from tiny import WORDS, tiny_picture, tiny_tower

from mmkd.data.samples import Sample, Turn
from mmkd.errors import TowerError
from mmkd.retrieval.cross_encoders import QUESTION, ItmEncoder, PromptedTower, load_matching
from mmkd.retrieval.matching import draw_negatives
from mmkd.retrieval.models import build_cross_encoder
from mmkd.retrieval.pairs import PairSet, pair_set
from mmkd.retrieval.recipe import CrossSpec
from mmkd.retrieval.score_table import ScoreTable

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ("red", "a green square left of a blue one", "C")
SPEC = CrossSpec(
    vision={**SIZES, "image_size": 16, "patch_size": 8, "initializer_range": 0.3},
    text={**SIZES, "max_position_embeddings": 32},
    vocab_size=300,
    embedding=8,
)


def blip(seed: int = 0) -> ItmEncoder:
    encoder = build_cross_encoder(SPEC, WORDS, seed)
    with torch.no_grad():  # far from zero, so that scores differ
        for parameter in encoder.model.text_encoder.parameters():
            parameter.mul_(8)
    return encoder.freeze()


@pytest.fixture
def pairs(tmp_path) -> PairSet:
    refs = [tiny_picture(tmp_path, f"{n}.png", n) for n in range(3)]
    return pair_set(list(zip(refs, TEXTS, strict=True)))


def everything(pairs: PairSet) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(len(pairs.images)), torch.arange(len(pairs.texts)))


def test_matching_head_is_that_of_transformers(pairs):
    teacher = blip()
    found = teacher.scores(pairs.images, pairs.texts, everything(pairs)).reshape(3, 3)
    for i, image in enumerate(pairs.images):
        for t, text in enumerate(pairs.texts):
            inputs = teacher.processor(images=image.load(), text=text, return_tensors="pt")
            with torch.no_grad():
                expected = teacher.model(**inputs).itm_score.softmax(-1)[0, 1]
            torch.testing.assert_close(found[i, t], expected, rtol=1e-4, atol=1e-6)
    assert len(found.flatten().unique()) == 9 and found.std() > 1e-3


def test_a_prompted_tower_compares_its_two_answers(pairs):
    tower = tiny_tower(3)
    teacher = PromptedTower(tower, yes="red", no="left of").freeze()  # answers of one and of several tokens
    found = teacher.scores(pairs.images, pairs.texts, everything(pairs)).reshape(3, 3)

    def log_p(image, text, answer):
        turns = (Turn("user", QUESTION.replace("{text}", text), 1), Turn("assistant", answer))
        inputs = tower.prepare([Sample("s", (image,), turns)])
        with torch.no_grad():
            output = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
        known = output.logits.double()[inputs.response][:, : tower.vocabulary].log_softmax(-1)
        return known.gather(-1, inputs.targets[inputs.response][:, None]).sum()

    for i, image in enumerate(pairs.images):
        for t, text in enumerate(pairs.texts):
            yes, no = log_p(image, text, "red").exp(), log_p(image, text, "left of").exp()
            torch.testing.assert_close(found[i, t].double(), yes / (yes + no), rtol=1e-4, atol=1e-7)
    assert len(found.flatten().unique()) == 9


@pytest.mark.parametrize("make", [blip, lambda: PromptedTower(tiny_tower(3)).freeze()])
def test_batches_and_order_change_nothing(make, pairs):
    teacher, every = make(), everything(pairs)
    whole = teacher.scores(pairs.images, pairs.texts, every)
    order = torch.tensor([4, 8, 0, 3])
    some = teacher.scores(pairs.images, pairs.texts, every[order], batch_size=2)
    torch.testing.assert_close(some, whole[order], rtol=1e-4, atol=1e-6)


def test_fingerprints_tell_what_scores_depend_on():
    tower = tiny_tower(3)
    prompts = ({}, {"question": "Is it {text}?"}, {"yes": "Yes"})
    assert len({PromptedTower(tower, **prompt).fingerprint() for prompt in prompts}) == 3
    assert blip(0).fingerprint() == blip(0).fingerprint() != blip(1).fingerprint()


def test_the_table_asks_once_and_survives(pairs, tmp_path):
    teacher = blip()
    table = ScoreTable(teacher, pairs, tmp_path / "scores")
    images, texts = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[2, 2], [2, 1]])
    first = table.scores(images, texts)
    assert table.computed == 3, "a pair that is asked twice is scored once"
    assert torch.equal(first, table.scores(images, texts)) and table.computed == 3
    table.save()
    again = ScoreTable(teacher, pairs, tmp_path / "scores")
    assert torch.equal(first, again.scores(images, texts)) and again.computed == 0
    other = ScoreTable(blip(1), pairs, tmp_path / "scores")
    other.scores(images, texts)
    assert other.computed == 3, "another teacher's scores are not taken"
    torch.testing.assert_close(again.all_scores(), teacher.scores(pairs.images, pairs.texts, everything(pairs)).reshape(3, 3))


def test_too_many_pairs_are_scored_afresh(pairs, monkeypatch):
    table = ScoreTable(blip(), pairs)
    expected = table.all_scores()
    monkeypatch.setattr("mmkd.retrieval.score_table.TABLE_ENTRIES", 8)
    live = ScoreTable(blip(), pairs)
    torch.testing.assert_close(live.all_scores(), expected, rtol=1e-4, atol=1e-6)
    live.all_scores()
    assert live.computed == 18


def test_drawn_negatives_are_hard_and_none_is_a_positive():
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 5.0, 0.0, 4.0]] * 2)
    positives = torch.tensor([[True, False, False, False], [False, True, False, False]])
    drawn = draw_negatives(logits, positives, 400).reshape(2, 400)
    shares = torch.stack([torch.bincount(row, minlength=4) for row in drawn]) / 400  # [2, 4]
    assert shares[0, 0] == 0 and shares[1, 1] == 0
    assert shares[0, 1] == pytest.approx(0.73, abs=0.1) and shares[1, 0] > 0.95


def test_errors(tmp_path):
    tiny_tower().save(tmp_path / "vlm")
    with pytest.raises(TowerError, match=r"'llava', not a BLIP; set teacher.kind=prompted"):
        load_matching(tmp_path / "vlm")
    from transformers import BlipForConditionalGeneration

    encoder = blip()
    BlipForConditionalGeneration(encoder.model.config).save_pretrained(tmp_path / "captioner")
    encoder.processor.save_pretrained(tmp_path / "captioner")
    with pytest.raises(TowerError, match="no image-text-matching head"):
        load_matching(tmp_path / "captioner")
    with pytest.raises(TowerError, match="no place for the text"):
        PromptedTower(tiny_tower(), "Does it match?")
