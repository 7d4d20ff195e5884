"""What several towers of a process share of prepared samples."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.data.samples import Turn
from mmkd.errors import SampleError
from mmkd.towers.kept import PreparedSamples


@pytest.fixture
def towers():
    tokenizer, kept = tiny_tokenizer(), PreparedSamples()
    made = [tiny_tower(seed, 16, tokenizer=tokenizer) for seed in (1, 2)]
    for tower in made:
        tower.preparer.kept = kept
    return made


def count_work(monkeypatch, tower):
    """A list that grows by one with each sample that is really prepared."""
    done, real = [], type(tower.preparer).encode
    monkeypatch.setattr(type(tower.preparer), "encode", lambda self, *a, **k: done.append(1) or real(self, *a, **k))
    return done


def equal(a, b):
    same = torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets) and a.pixels.keys() == b.pixels.keys()
    return same and all(torch.equal(a.pixels[name], b.pixels[name]) for name in a.pixels)


def test_towers_that_prepare_alike_do_it_once(towers, tmp_path, monkeypatch):
    samples = tiny_samples(tmp_path, 3, text_only=1)
    alone = [tiny_tower(1, 16, tokenizer=towers[0].tokenizer).encode(sample) for sample in samples]
    done = count_work(monkeypatch, towers[0])
    first = [towers[0].encode(sample, keep=True) for sample in samples]
    assert len(done) == 4
    again = [tower.encode(replace(sample, id=f"other {sample.id}"), keep=True) for tower in towers for sample in samples]
    assert len(done) == 4
    assert all(equal(a, b) for a, b in zip(alone * 2, again, strict=True)) and all(map(equal, alone, first))
    assert [one.id for one in again[:4]] == [f"other {sample.id}" for sample in samples]
    towers[0].encode(samples[0], with_answer=False, keep=True)
    towers[0].encode(samples[0])  # which is not to be kept
    assert len(done) == 6


def test_another_text_picture_answer_or_processor_is_another_sample(towers, tmp_path, monkeypatch):
    one, other = tiny_samples(tmp_path, 2)
    done = count_work(monkeypatch, towers[0])
    towers[0].encode(one, keep=True)
    turns = one.turns
    for number, changed in enumerate(
        [
            replace(one, images=other.images),
            replace(one, turns=(*turns[:-1], Turn("assistant", "another answer"))),
            replace(one, turns=(replace(turns[0], text=turns[0].text + "?"), *turns[1:])),
            replace(one, turns=(Turn("system", "be short"), *turns)),
        ]
    ):
        towers[0].encode(changed, keep=True)
        assert len(done) == number + 2
    towers[1].max_length -= 1
    towers[1].encode(one, keep=True)
    assert len(done) == 6
    from PIL import Image

    Image.new("RGB", (9, 9), "red").save(one.images[0].file)
    assert not equal(towers[0].encode(one, keep=True), towers[0].encode(other, keep=True)) and len(done) == 8


def test_a_picture_is_held_once_and_memory_is_bounded(towers, tmp_path, monkeypatch):
    sample = tiny_samples(tmp_path, 1)[0]
    asked = [replace(sample, turns=(replace(sample.turns[0], text=f"is it {n}?"), *sample.turns[1:])) for n in range(6)]
    kept = towers[0].preparer.kept
    encoded = [towers[0].encode(one, keep=True) for one in asked]
    pixels = sum(tensor.numel() * tensor.element_size() for tensor in encoded[0].pixels.values())
    assert pixels < kept.bytes < 2 * pixels
    kept.limit = kept.bytes
    done = count_work(monkeypatch, towers[0])
    new = replace(asked[0], turns=(replace(sample.turns[0], text="is it 7?"), *sample.turns[1:]))
    for _ in range(2):
        towers[0].encode(new, keep=True)
    assert len(done) == 2 and kept.bytes == kept.limit


def test_what_cannot_be_prepared_says_so_each_time(towers, tmp_path):
    sample = replace(tiny_samples(tmp_path, 1)[0], turns=(Turn("user", "what?", images=1), Turn("assistant", " ")))
    for _ in range(2):
        with pytest.raises(SampleError, match="empty answer"):
            towers[0].encode(sample, keep=True)


def test_answers_are_those_of_a_tower_that_keeps_nothing(towers, tmp_path, monkeypatch):
    samples = [sample for sample in tiny_samples(tmp_path, 3) for _ in range(2)]
    asked = [replace(one, turns=(replace(one.turns[0], text=f"{one.turns[0].text} {n}"),)) for n, one in enumerate(samples)]
    expected = tiny_tower(1, 16, tokenizer=towers[0].tokenizer).answer(asked, max_new_tokens=4)
    assert towers[0].answer(asked, max_new_tokens=4) == expected
    done = count_work(monkeypatch, towers[0])
    assert towers[0].answer(asked, max_new_tokens=4) == expected and not done


def test_copies_share_it_and_other_processes_begin_with_nothing(towers, tmp_path):
    towers[0].encode(tiny_samples(tmp_path, 1)[0], keep=True)
    kept = towers[0].preparer.kept
    assert copy.deepcopy(kept) is kept and kept.bytes > 0
    other = pickle.loads(pickle.dumps(kept))
    assert other.bytes == 0 and other.limit == kept.limit
