"""Mixed pictures: what is mixed, that both towers see the same, and where it is refused."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_picture, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.base.checksums import hash_of
from mmkd.data.lazy import Lazy
from mmkd.data.mixup import MixedPicture, MixupSpec, mixed
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_recipe
from mmkd.runs.run import distill
from mmkd.train.collate import PairDataset
from mmkd.train.spec import StageSpec


def test_a_mixture_is_the_weighted_mean_of_both_pixels(tmp_path):
    own, other = tiny_picture(tmp_path, "a.png", 1, (20, 16)), tiny_picture(tmp_path, "b.png", 2, (20, 16))
    a, b = (np.asarray(ref.load(), dtype=np.float64) for ref in (own, other))
    found = np.asarray(MixedPicture(own, other, 0.3).load(), dtype=np.float64)
    assert np.abs(found - (0.3 * a + 0.7 * b)).max() <= 1
    assert np.array_equal(np.asarray(MixedPicture(own, other, 1.0).load()), a)  # nothing of the other
    assert MixedPicture(own, tiny_picture(tmp_path, "c.png", 3, (16, 24)), 0.5).load().size == (20, 16)
    assert MixedPicture(own, other, 0.3).key != MixedPicture(own, other, 0.31).key != own.key


def test_which_samples_are_mixed_follows_from_seed_and_id_and_nothing_else_changes(tmp_path):
    samples = tiny_samples(tmp_path, 40, text_only=3)
    assert mixed(samples, None, 0) is samples and mixed(samples, MixupSpec(share=0), 0) is samples
    some = mixed(samples, MixupSpec(share=0.5), 0)
    changed = [n for n, sample in enumerate(some) if any(isinstance(ref, MixedPicture) for ref in sample.images)]
    assert 10 < len(changed) < 30 and not set(changed) & {40, 41, 42}
    assert all((a.id, a.turns, a.meta) == (b.id, b.turns, b.meta) for a, b in zip(samples, some, strict=True))
    assert all(some[n].images[0].own == samples[n].images[0] != some[n].images[0].other for n in changed)
    assert mixed(samples, MixupSpec(share=0.5), 0) == some != mixed(samples, MixupSpec(share=0.5), 1)
    lazy = mixed(Lazy(samples, lambda sample: sample), MixupSpec(share=0.5), 0)
    assert isinstance(lazy, Lazy) and list(lazy) == some
    shares = [s.images[0].share for s in mixed(samples, MixupSpec(share=1, alpha=50), 0)[:40]]
    assert all(0.3 < share < 0.7 for share in shares)
    assert mixed(samples[:1], MixupSpec(share=1), 0) == samples[:1]  # no other picture


def test_both_towers_prepare_the_same_mixture(tmp_path):
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_tower(1, 16, tokenizer=tokenizer), tiny_tower(2, 32, tokenizer=tokenizer)
    (sample, *_) = mixed(tiny_samples(tmp_path, 4), MixupSpec(share=1, alpha=50), 0)
    pair = PairDataset([sample], student, teacher, [])[0]
    whole = student.encode(sample, pictures=[sample.images[0].load()])
    for encoded in (pair.student, pair.teachers["teacher"].inputs):
        assert all(torch.equal(encoded.pixels[name], whole.pixels[name]) for name in whole.pixels)
    plain = student.encode(sample, pictures=[sample.images[0].own.load()])
    assert any(not torch.equal(plain.pixels[name], whole.pixels[name]) for name in whole.pixels)


MIXED = [{"format": "jsonl", "mixup": {"share": 0.5}}]


@pytest.mark.parametrize("terms", [{"cross_entropy": 1}, {"forward_kl": 1}, {"feature_match": 1, "kl": {"kind": "forward_kl"}},
                                   {"tags": 1}])  # fmt: skip
def test_terms_that_read_answers_are_refused(terms):
    with pytest.raises(ValidationError, match="an answer to one picture is none to a mixture of two"):
        StageSpec(data=MIXED, steps=2, terms=terms)
    StageSpec(data=[{"format": "jsonl"}], steps=2, terms=terms)
    StageSpec(data=MIXED, steps=2, terms={"feature_match": 1, "relation": 1})


def test_a_run_learns_from_mixtures_and_a_share_of_none_is_an_ordinary_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_tower(5, 16, tokenizer=tokenizer).save(tmp_path / "teacher")
    tiny_tower(6, 16, tokenizer=tokenizer).save(tmp_path / "student")
    for n in range(8):
        tiny_picture(tmp_path / "data", f"{n}.png", n)
    rows = [{"id": str(n), "image": f"{n}.png", "question": "what?", "answer": "red"} for n in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, mixup in (("plain", {}), ("none", {"mixup": {"share": 0}}), ("half", {"mixup": {"share": 0.5}}), ("again", {})):
        entry = {"format": "jsonl", "root": str(tmp_path / "data"), **({"mixup": {"share": 0.5}} if name == "again" else mixup)}
        stage = {"data": [entry], "steps": 2, "terms": {"feature_match": 1}, "train": ["vision"],
                 "optimiser": {"batch_size": 4, "learning_rate": 0.01}}  # fmt: skip
        raw = {"title": "t", "output": str(tmp_path / name), "stages": {"only": stage}, "controls": False,
               "teacher": {"model": str(tmp_path / "teacher")}, "student": {"model": str(tmp_path / "student")},
               "guards": {"pixels_matter": False, "teacher_is_better": False}}  # fmt: skip
        recipe = validate(raw, "test", Recipe)
        assert control_recipe(recipe).stages["only"].data[0].mixup is None  # it learns answers
        distill(recipe)
        found[name] = hash_of(tmp_path / name / "student" / "model.safetensors")
    assert found["plain"] == found["none"] != found["half"] == found["again"]
