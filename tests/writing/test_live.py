"""A tower as the author: the same answers in any batch, odds of a judge, prompts that it cannot read."""

import pytest
from tiny import tiny_samples, tiny_tower

from mmkd.towers.sampling import Sampling
from mmkd.writing.authors import LiveAuthor, Request, _thought, key_of


@pytest.fixture(scope="module")
def tower():
    return tiny_tower(5, 16)


def requests_of(author, samples, options=None):
    asked = [sample.by_answer()[0] for sample in samples]
    found = []
    for n, sample in enumerate(asked):
        sample = type(sample)(sample.id, sample.images, sample.prompt_turns)
        found.append(Request(f"{n}", sample, 0, key_of(author, sample, [ref.key for ref in sample.images], 0, options), options))
    return found


def test_draws_belong_to_the_request(tower, tmp_path):
    author = LiveAuthor("teacher", tower, "m", Sampling(6, 1.0))
    asked = requests_of(author, tiny_samples(tmp_path, 5))
    together = {request.id: said.text for request, said in author.answers(asked)}
    alone = {request.id: said.text for one in reversed(asked) for request, said in author.answers([one])}
    assert together == alone and len(set(together.values())) > 1
    again = [Request(one.id, one.sample, 1, key_of(author, one.sample, [], 1)) for one in asked]
    assert {request.id: said.text for request, said in author.answers(again)} != together


def test_greedy_answers_are_those_of_the_tower(tower, tmp_path):
    author = LiveAuthor("teacher", tower, "m", Sampling(6, 0.0))
    asked = requests_of(author, tiny_samples(tmp_path, 4))
    said = [said for _, said in author.answers(asked)]
    assert [one.text for one in said] == tower.answer([one.sample for one in asked], max_new_tokens=6)
    assert all(one.cut for one in said)  # a random tower comes to no end


def test_other_sampling_is_another_author(tower):
    ways = [(Sampling(6, 0.0), ()), (Sampling(7, 0.0), ()), (Sampling(6, 0.5), ()), (Sampling(6, 0.0, 0.9), ())]
    keys = {LiveAuthor("t", tower, "m", how, stop).key for how, stop in [*ways, (Sampling(6, 0.0), ("x",))]}
    assert len(keys) == 5


def test_odds_are_those_of_the_two_words(tower, tmp_path):
    author = LiveAuthor("judge", tower, "m", Sampling(1, 0.0))
    asked = requests_of(author, tiny_samples(tmp_path, 3), ("red", "blue"))
    _, wanted = tower.choose_with_likelihood([one.sample for one in asked], [("red", "blue")] * 3)
    odds = [said.odds for _, said in author.answers(asked)]
    assert odds == pytest.approx([one.choices[0] - one.choices[1] for one in wanted], abs=1e-4)


def test_a_picture_that_does_not_decode_is_counted_and_stops_no_other(tower, tmp_path):
    author = LiveAuthor("teacher", tower, "m", Sampling(4, 0.0))
    asked = requests_of(author, tiny_samples(tmp_path, 3))
    broken = asked[1].sample.images[0]
    (broken.root / broken.name).write_bytes(b"no picture")
    said = {request.id: said for request, said in author.answers(asked)}
    assert said["1"].text is None and said["1"].refused.startswith("cannot be prepared")
    assert said["0"].text is not None and said["2"].text is not None


def test_stops_and_thinking():
    assert _thought("red\nand more", False, ["\n"], cut=True).row() == {"text": "red"}
    assert _thought("<think>so</think> red", False, [], cut=False).text == "red"
    assert _thought("so</think>red", True, [], cut=False).text == "red"
    assert _thought("so it is", True, [], cut=False).row() == {"text": "", "cut": True}
