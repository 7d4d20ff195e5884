"""Guards: samples are really prepared with other samples' pictures, whatever these measure."""

import logging
from dataclasses import replace

import pytest
import torch
from tiny import make_term, tiny_picture, tiny_samples, tiny_tower

from mmkd.data.samples import Sample, Turn
from mmkd.errors import GuardError
from mmkd.teachers.live import LiveTeacher
from mmkd.terms.term import Schedule
from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.tower import Seen
from mmkd.train import guards
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.exchange import exchanged
from mmkd.train.guards import answer_loss, answer_rows, check_pixels, check_pixels_of_set, run_guards

SIZES = ((64, 32), (32, 64), (96, 64), (64, 64))  # of a different number of visual tokens in Qwen's families


@pytest.fixture(scope="module")
def qwen():
    return tiny_family("qwen2_5_vl")


def pictured(folder, sizes=SIZES, answers=("red", "green", "blue", "round")):
    refs = [tiny_picture(folder, f"{i}.png", i, size) for i, size in enumerate(sizes)]
    return [
        Sample(f"s{i}", (ref,), (Turn("user", "What is it?", 1), Turn("assistant", answer)))
        for i, (ref, answer) in enumerate(zip(refs, answers, strict=False))
    ]


def encoded_by(tower, samples):
    return [tower.encode(sample) for sample in samples]


def test_pictures_of_other_sizes_are_really_prepared(tmp_path, qwen):
    samples = pictured(tmp_path)
    own = encoded_by(qwen, samples)
    found = exchanged(qwen, samples, own)
    assert found.places == [0, 1, 2, 3]
    counts = [qwen.visual_count(one) for one in own]
    assert len(set(counts)) > 1
    swapped = [replace(s, images=samples[(i + 1) % 4].images) for i, s in enumerate(samples)]
    for other, wanted in zip(found.other, encoded_by(qwen, swapped), strict=True):
        assert torch.equal(other.input_ids, wanted.input_ids)
        assert torch.equal(other.pixels["pixel_values"], wanted.pixels["pixel_values"])
    for one, other in found.probe:  # the same tokens, other pixels
        assert torch.equal(one.input_ids, other.input_ids)
        assert not torch.equal(one.pixels["pixel_values"], other.pixels["pixel_values"])


def test_a_blind_tower_is_found_where_pictures_differ_in_size(tmp_path, qwen, monkeypatch):
    samples = pictured(tmp_path)
    own = encoded_by(qwen, samples)
    assert check_pixels("student", qwen, samples, own) is True
    see = qwen.see

    def grey(inputs):
        return Seen([], [torch.ones_like(token) for token in see(inputs).tokens])

    monkeypatch.setattr(qwen, "see", grey)
    # The loss does move: there are other numbers of grey tokens.
    moved = [qwen.collate(x) for x in (own, exchanged(qwen, samples, own).other)]
    assert len({answer_loss(qwen, x, answer_rows(qwen, x)) for x in moved}) == 2
    with pytest.raises(GuardError, match="pixels never reach the language model"):
        check_pixels("student", qwen, samples, own)


@pytest.mark.parametrize("images", [(2, 1), (2, 2)])
def test_samples_with_several_pictures_get_as_many_others(tmp_path, images):
    tower = tiny_tower(1)
    refs = [tiny_picture(tmp_path, f"{i}.png", i) for i in range(4)]
    groups = [tuple(refs[: images[0]]), tuple(refs[images[0] : sum(images)])]
    samples = [
        Sample(f"s{i}", group, (Turn("user", "both?", len(group)), Turn("assistant", "red"))) for i, group in enumerate(groups)
    ]
    found = exchanged(tower, samples, encoded_by(tower, samples))
    assert [one.images for one in found.other] == list(images)
    assert check_pixels("student", tower, samples, encoded_by(tower, samples))


def test_one_picture_for_all_cannot_tell(tmp_path, caplog):
    tower = tiny_tower(1)
    first, second = tiny_samples(tmp_path, 2)
    same = replace(second, images=first.images)
    copied = replace(second, images=(tiny_picture(tmp_path, "copy.png", 0),))
    for samples in ([first, same], [first, copied]):  # also where the same picture lies in two files
        assert check_pixels("student", tower, samples, encoded_by(tower, samples)) is False
    third = [first, same, second]
    assert check_pixels("student", tower, third, encoded_by(tower, third)) is True
    with caplog.at_level(logging.INFO):
        assert "student_loss_permuted" not in guarded(tower, tiny_tower(2), [first, same])
    assert "no two pictures" in caplog.text


def test_pictures_with_which_a_sample_is_too_long_are_not_tried(tmp_path, qwen):
    samples = pictured(tmp_path, sizes=((32, 32), (64, 64), (160, 160)))
    longest = max(len(one.input_ids) for one in encoded_by(qwen, samples[:2]))
    qwen.max_length, before = longest + 2, qwen.max_length
    try:
        own = encoded_by(qwen, samples[:2])
        found = exchanged(qwen, samples, [*own, own[0]])
    finally:
        qwen.max_length = before
    assert found.places[:2] == [0, 1]
    assert all(len(one.input_ids) <= longest + 2 for one in found.other)


def test_a_text_only_set_has_nothing_to_exchange(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        facts = guarded(tiny_tower(1), tiny_tower(2), tiny_samples(tmp_path, 0, text_only=3))
    assert set(facts) == {"student_loss", "teacher_loss"} and "pictures" not in caplog.text


def guarded(student, teacher, samples):
    terms = [make_term("kl", "forward_kl", Schedule(1, 1))]
    dataset = PairDataset(samples, student, teacher, terms)
    distiller = Distiller(student, {"teacher": LiveTeacher(teacher)}, terms)
    return run_guards(distiller, dataset, 8, pixels_matter=True, teacher_is_better=False)


def test_a_teacher_that_hardly_looks_is_reported(tmp_path, caplog):
    """It knows its answers by the questions; a tower that has learned its pictures is not reported."""
    samples = [
        replace(s, turns=(replace(s.turns[0], text=f"number {i}"), s.turns[1]))
        for i, s in enumerate(pictured(tmp_path, sizes=((20, 16),) * 4))
    ]
    asked = [replace(s, turns=(replace(s.turns[0], text="what"), s.turns[1])) for s in samples]
    reported = {}
    for name, given in (("question", samples), ("picture", asked)):
        teacher = tiny_tower(2, 32)
        if name == "question":
            for parameter in teacher.projector.parameters():
                parameter.data.mul_(1e-4)
        trained_on(teacher, given)
        caplog.clear()
        facts = guarded(tiny_tower(1), teacher, given)
        reported[name] = "hardly looks at them" in caplog.text, facts["teacher_loss"]
    assert reported["question"][0] is True and reported["question"][1] < 0.2
    assert reported["picture"][0] is False and reported["picture"][1] < 0.2


def trained_on(tower, samples, steps=60):
    inputs = tower.prepare(samples)
    trained = [p for n, p in tower.part_parameters()["language"]]
    optimiser = torch.optim.Adam(trained, lr=3e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        hidden = tower.read(inputs, tower.see(inputs))[inputs.response]
        loss = torch.nn.functional.cross_entropy(tower.head(hidden), inputs.targets[inputs.response])
        loss.backward()
        optimiser.step()


def test_a_set_is_judged_by_samples_from_all_over_it(tmp_path, monkeypatch):
    tower = tiny_tower()
    samples = tiny_samples(tmp_path, 40, text_only=8)  # as a cache orders them, its first batch would be of one kind
    judged = []
    monkeypatch.setattr(guards, "check_pixels", lambda _, __, found, encoded: judged.extend(zip(found, encoded, strict=True)))
    check_pixels_of_set("teacher", tower, samples, 8)
    assert [sample.id for sample, _ in judged] == [f"s{place}" for place in range(0, 40, 5)]
    for sample, encoded in judged:
        assert torch.equal(encoded.input_ids, tower.encode(sample).input_ids)
