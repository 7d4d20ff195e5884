"""Answers that the teacher mends, against a walk by hand through whole logits."""

import pytest
import torch
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower

from mmkd.answers import Asked
from mmkd.answers.mended import MendedAnswers, mend
from mmkd.answers.student import StudentAnswers
from mmkd.errors import DataError
from mmkd.teachers.live import LiveTeacher

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def towers():
    return tiny_tower(1, 16, tokenizer=TOKENIZER), LiveTeacher(tiny_tower(2, 32, tokenizer=TOKENIZER))


def asked(towers, samples):
    student, teacher = towers
    return [Asked(student.encode(s, with_answer=False), tuple(r.key for r in s.images), 7 + n,
                  {"teacher": teacher.body.encode(s, with_answer=False)}) for n, s in enumerate(samples)]  # fmt: skip


def rows(tower, prompt, ids):
    inputs = tower.collate([prompt])
    text = torch.cat([inputs.input_ids, torch.tensor([ids])], 1)
    out = tower.model(input_ids=text, attention_mask=torch.ones_like(text), **inputs.pixels).logits[0].double()
    return out[inputs.input_ids.shape[1] - 1 : -1, : len(TOKENIZER)].log_softmax(-1)


def test_the_token_that_the_teacher_most_disagrees_with_is_changed_and_the_student_goes_on(tmp_path, towers):
    student, teacher = towers
    prompts = asked(towers, tiny_samples(tmp_path, 4, text_only=1))
    how = {"max_new_tokens": 6, "temperature": 0.8}
    before = StudentAnswers(**how).answer(student, prompts)
    mended = MendedAnswers(**how).answer_beside(student, {"teacher": teacher}, prompts)
    changed = 0
    for one, old, new in zip(prompts, before, mended, strict=True):
        with torch.no_grad():
            p, q = rows(teacher.tower, one.theirs["teacher"], old), rows(student, one.prompt, old)
        wrong = [n for n in range(len(old)) if int(p[n].argmax()) != old[n]]
        if not wrong:
            assert new == old
            continue
        changed += 1
        place = max(wrong, key=lambda n: float((p[n].exp() * (p[n] - q[n])).sum()))
        assert new[:place] == old[:place] and new[place] == int(p[place].argmax())
        assert len(new) <= 6 and all(token not in student.stop_ids for token in new[:-1])
        assert len(new) == 6 or new[-1] in student.stop_ids
    assert changed
    assert mended == MendedAnswers(**how).answer_beside(student, {"teacher": teacher}, prompts)
    alone = [MendedAnswers(**how).answer_beside(student, {"teacher": teacher}, [one])[0] for one in prompts]
    assert alone == mended  # whatever batch they are in


def test_equal_models_never_change_a_greedy_answer_and_no_correction_changes_none(tmp_path, towers):
    student, teacher = towers
    prompts = asked((student, LiveTeacher(student)), tiny_samples(tmp_path, 3))
    greedy = {"max_new_tokens": 5, "temperature": 0}
    before = StudentAnswers(**greedy).answer(student, prompts)
    assert MendedAnswers(**greedy, corrections=3).answer_beside(student, {"teacher": LiveTeacher(student)}, prompts) == before
    assert MendedAnswers(**greedy, corrections=0).answer_beside(student, {"teacher": teacher}, prompts) == before


def test_an_end_that_the_teacher_puts_is_the_end():
    teacher, student = torch.zeros(3, 4), torch.zeros(3, 4)
    teacher[1, 3] = 5
    assert mend([0, 1, 0], teacher.log_softmax(-1), student.log_softmax(-1)) == [0, 3]
    assert mend([0, 3, 0], teacher.log_softmax(-1), student.log_softmax(-1)) is None


def test_a_stage_learns_from_them(tmp_path, towers):
    _, teacher = towers
    answers = {"mended": {"share": 1, "max_new_tokens": 4}}
    stage = tiny_stage(tiny_tower(1, 16, tokenizer=TOKENIZER), teacher, tiny_samples(tmp_path, 4), {"forward_kl": 1}, answers,
                       steps=1, log_every=1)  # fmt: skip
    tiny_stage_trainer(tmp_path, stage).train()
    assert '"generated_share": 1.0' in (tmp_path / "log.jsonl").read_text()


def test_who_cannot_mend_is_named(tmp_path, towers):
    student, teacher = towers
    other = LiveTeacher(tiny_tower(2, 32, tokenizer=tiny_tokenizer(280)))
    samples = tiny_samples(tmp_path, 4)
    for one, terms, answers, words in (
        (other, {"spans": 1}, {"mended": 1}, "have another id or none"),
        (teacher, {"forward_kl": 1}, {"mended": {"share": 1, "teacher": "techer"}}, "no teacher 'techer'"),
    ):
        with pytest.raises(DataError, match=words):
            tiny_stage(student, one, samples, terms, answers)
