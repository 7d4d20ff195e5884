"""Teachers that are made of the student, and teachers that see a sample otherwise than the student does."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_picture, tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower, weights_of

from mmkd.data.prompts import render
from mmkd.data.samples import Question
from mmkd.errors import SampleError
from mmkd.teachers.itself import SelfTeacher
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.spec import TeacherSpec
from mmkd.teachers.view import ImagesSpec, View
from mmkd.towers.inputs import IGNORE

TOKENIZER = tiny_tokenizer()
JSD = {"jsd": {"kind": "jsd", "beta": 0.5}}
OWN = {"student": {"share": 1, "max_new_tokens": 5}}
TOLD = View("{prompt} the answer is {answer}")


def student():
    return tiny_tower(1, 16, tokenizer=TOKENIZER)


def stage_of(folder, teacher, terms=JSD, answers=OWN, samples=None, **keys):
    samples = tiny_samples(folder / "pictures", 8) if samples is None else samples
    return tiny_stage(student(), teacher, samples, terms, answers, **keys)


@pytest.mark.parametrize("which", ["start", "ema", "current"])
@pytest.mark.parametrize("terms", [JSD, {"kl": {"kind": "forward_kl"}}, {"policy_gradient": {"positions": "generated"}}])
def test_the_same_context_and_the_same_weights_teach_nothing(tmp_path, which, terms):
    stage = stage_of(tmp_path, SelfTeacher(which), terms)
    loss, _ = stage.distiller(stage.batch_of(4))
    loss.backward()
    assert abs(loss.item()) < 1e-7
    assert max(p.grad.abs().max().item() for p in stage.student.model.parameters() if p.grad is not None) < 1e-5


def test_retention_is_zero_at_the_first_step_and_not_later(tmp_path):
    terms = {"cross_entropy": 1, "prompt": {"kind": "forward_kl", "positions": "prompt"}}
    stage = stage_of(tmp_path, SelfTeacher("start"), terms, None, steps=3, log_every=1)
    before = weights_of(stage.student)
    trainer = tiny_stage_trainer(tmp_path, stage)
    trainer.train()
    first, _, last = trainer.state.log_history[:3]
    assert first["prompt"] == pytest.approx(0, abs=1e-7) and last["prompt"] > 1e-4
    kept = weights_of(stage.teachers["teacher"].tower)
    assert all(torch.equal(before[name], kept[name]) for name in before)


def trained(folder, which, samples, resume=None, steps=4, save_every=2):
    stage = stage_of(folder, SelfTeacher(which, 0.5, view=TOLD), samples=samples, steps=steps, save_every=save_every)
    trainer = tiny_stage_trainer(folder, stage)
    trainer.train(resume_from_checkpoint=resume)
    return stage


@pytest.mark.parametrize("which", ["ema", "current", "start"])
def test_gone_on_from_a_checkpoint_is_undisturbed_to_the_bit(tmp_path, which):
    samples = tiny_samples(tmp_path / "pictures", 8)
    whole = trained(tmp_path / "a", which, samples)
    again = trained(tmp_path / "b", which, samples, resume=str(tmp_path / "a" / "stages" / "checkpoint-2"))
    for one, other in ((whole.student, again.student), (whole.teachers["teacher"].tower, again.teachers["teacher"].tower)):
        one, other = weights_of(one), weights_of(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_moving_average_is_one(tmp_path):
    samples = tiny_samples(tmp_path / "pictures", 8)
    states = []
    stage = stage_of(tmp_path, teacher := SelfTeacher("ema", 0.75, view=TOLD), samples=samples, steps=3)
    own = type(teacher).after_step

    def noted(self):
        own(self)
        states.append(weights_of(stage.student))

    expected = weights_of(stage.student)
    teacher.after_step = lambda: noted(teacher)
    tiny_stage_trainer(tmp_path, stage).train()
    assert len(states) == 3
    for state in states:
        expected = {name: 0.75 * kept.double() + 0.25 * state[name].double() for name, kept in expected.items()}
    kept = weights_of(teacher.tower)
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_told_the_answer_scores_the_same_tokens_behind_its_own_prompt(tmp_path):
    stage = stage_of(tmp_path, SelfTeacher("start", view=TOLD))
    batch = stage.batch_of(4)
    own, other = batch.student, batch.teacher
    assert torch.equal(own.targets[own.response], other.targets[other.response])
    samples = {s.id: s for s in stage.dataset.samples}
    for row, told, name in zip(own.input_ids, other.input_ids, own.ids, strict=True):
        sample = samples[name]
        said = TOKENIZER.decode(told, skip_special_tokens=True)
        assert f"{sample.turns[0].text} the answer is {sample.answer}" in said
        assert "the answer is" not in TOKENIZER.decode(row, skip_special_tokens=True)
    loss, _ = stage.distiller(batch)
    # The loss by hand: each tower's rows that predict the answer, in order.
    logs = []
    for inputs in (own, other):
        out = stage.student.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
        logs.append(out.logits.double()[inputs.targets != IGNORE].log_softmax(-1))
    q, p = (x.exp() for x in logs)
    middle = ((p + q) / 2).log()
    expected = ((p * (p.log() - middle) + q * (q.log() - middle)).sum(-1) / 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() > 1e-4


def test_a_live_teacher_may_see_more_also_on_the_answers_of_the_data(tmp_path):
    teacher = LiveTeacher(tiny_tower(2, 32, tokenizer=TOKENIZER), view=TOLD)
    batch = stage_of(tmp_path, teacher, answers=None).batch_of(4)
    assert batch.teacher is not batch.student and batch.teacher.input_ids.shape[1] > batch.student.input_ids.shape[1]


def question(folder, **keys):
    picture = tiny_picture(folder, "a.png", 1, (20, 16))
    given = {"id": "q", "question": "Which?", "images": (picture,), "choices": ("a cat", "a dog"), "answer_index": 1}
    return Question(**given | {"hint": "pets"} | keys)


def test_a_prompt_names_what_the_data_have(tmp_path):
    sample = render(question(tmp_path, told={"lecture": "dogs bark"}, ocr_tokens=("X", "Y")), "letter", with_answer=True)
    view = View("Told: {reference}. {lecture}. {ocr} ({answer})\n{prompt}")
    assert view(sample).turns[0].text == "Told: a dog. dogs bark. X, Y (B)\n" + sample.turns[0].text
    assert view(sample).turns[1] == sample.turns[1]
    with pytest.raises(SampleError, match="'rationale'"):
        View("{prompt} {rationale}")(sample)
    with pytest.raises(SampleError, match="no reference"):
        View("{prompt} {reference}")(render(question(tmp_path, choices=(), answer_index=None), "plain", with_answer=False))


def test_pictures_in_the_prompt_keep_their_places(tmp_path):
    sample = render(question(tmp_path, question="Is <image> round?", choices=(), answer="no"), "plain", with_answer=True)
    told = View("Look: {prompt}")(sample)
    assert told.turns[0].parts == ["Look: Is ", None, " round?"]


@pytest.mark.parametrize(("box", "size"), [("2, 3, 12, 9", (10, 6)), ("0.5 0.5 1 1", (10, 8)), ("-5,0,40,40", (20, 16))])
def test_a_teacher_sees_the_crop_by_its_box(tmp_path, box, size):
    sample = render(question(tmp_path, told={"box": box}), "letter", with_answer=True)
    seen = View(images=ImagesSpec(crop="box"))(sample)
    assert seen.images[0].load().size == size and seen.images[0].key != sample.images[0].key
    both = View(images=ImagesSpec(crop="box", keep=True))(sample)
    assert [picture.load().size for picture in both.images] == [(20, 16), size] and both.turns[0].images == 2


def test_boxes_that_are_none_are_refused_and_samples_without_one_keep_their_picture(tmp_path):
    view, plain = View(images=ImagesSpec(crop="box")), render(question(tmp_path), "letter", with_answer=True)
    assert view(plain) == plain
    for text in ("1,2,3", "a b c d", "5,5,2,9"):
        with pytest.raises(SampleError, match="not a box"):
            view(render(question(tmp_path, told={"box": text}), "letter", with_answer=True))
    with pytest.raises(SampleError, match="no pixel"):
        view(render(question(tmp_path, told={"box": "50,50,60,60"}), "letter", with_answer=True)).images[0].load()


def test_the_crop_reaches_the_teacher(tmp_path):
    asked = question(tmp_path, told={"box": "0,0,5,5"})
    samples = [render(replace(asked, id=f"q{n}"), "letter", with_answer=True) for n in range(4)]
    stage = stage_of(tmp_path, SelfTeacher("start", view=View(images=ImagesSpec(crop="box"))), samples=samples)
    batch = stage.batch_of(2)
    assert torch.equal(batch.student.input_ids, batch.teacher.input_ids)
    assert not torch.equal(batch.student.pixels["pixel_values"], batch.teacher.pixels["pixel_values"])
    assert stage.distiller(batch)[0].item() > 1e-6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "self: start"),
        ({"self": "begin"}, "start"),
        ({"self": "start", "model": "x"}, "no model of its own"),
        ({"self": "start", "decay": 0.9}, "no decay"),
        ({"self": "ema", "cache": "c"}, "no cache"),
        ({"model": "x", "decay": 0.9}, "belongs to"),
        ({"model": "x", "prompt": "answer: {"}, "braces"),
        ({"model": "x", "prompt": "{prompt!r}"}, "names no field"),
        ({"model": "x", "prompt": "hello"}, "same of every sample"),
        ({"model": "x", "prompt": "{prompt} {answer}", "cache": "c"}, "take `cache` out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        TeacherSpec(**given)
