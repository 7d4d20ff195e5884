"""Prompts word for word as LLaVA-1.5's evaluation files have them."""

import pytest

from mmkd.data.prompts import letter_of, render
from mmkd.data.samples import ImageRef, Question, Turn
from mmkd.errors import DataError

IMAGE = ImageRef("root", "a.png")
CHOICE = Question("7", "Which is it?", (IMAGE,), "fish", ("fish",), ("bird", "fish"), 1, hint="It swims.")
OPEN = Question("8", "What does it say?", (IMAGE,), "stop", ("stop",), ocr_tokens=("STOP", "4"))


def prompt(question, style, **options):
    return render(question, style, with_answer=False, **options).turns[0].text


def test_letter():
    expected = (
        "Context: It swims.\nWhich is it?\nA. bird\nB. fish\n"
        "Answer with the option's letter from the given choices directly."
    )
    sample = render(CHOICE, "letter", with_answer=True)
    assert sample.turns == (Turn("user", expected, images=1), Turn("assistant", "B"))
    assert (sample.id, sample.images, sample.meta) == ("7", (IMAGE,), {"question": CHOICE})


def test_short_with_and_without_ocr_tokens():
    instruction = "\nAnswer the question using a single word or phrase."
    assert prompt(OPEN, "short") == "What does it say?" + instruction
    with_tokens = "What does it say?\nReference OCR token: STOP, 4" + instruction
    assert prompt(OPEN, "short", ocr=True) == with_tokens
    bare = Question("9", "What?", ())
    assert prompt(bare, "short", ocr=True) == "What?\nReference OCR token: " + instruction
    assert render(OPEN, "short", with_answer=True).answer == "stop"


def test_plain_is_the_question_alone():
    assert prompt(CHOICE, "plain") == "Which is it?"
    assert render(CHOICE, "plain", with_answer=True).answer == "fish"


def test_the_prompt_is_the_same_with_and_without_the_answer():
    for question, style in ((CHOICE, "letter"), (OPEN, "short"), (OPEN, "plain")):
        trained, asked = (render(question, style, with_answer=w) for w in (True, False))
        assert trained.prompt_turns == asked.turns


def test_questions_without_or_with_several_pictures():
    assert render(Question("1", "Why?"), "plain", with_answer=False).turns[0].images == 0
    two = render(Question("1", "Which?", (IMAGE, IMAGE)), "plain", with_answer=False)
    assert (two.turns[0].images, len(two.images)) == (2, 2)


@pytest.mark.parametrize(
    ("question", "style", "options", "message"),
    [
        (Question("q1", " \n"), "plain", {}, "'q1' has no text"),
        (Question("q2", "Why?", answer=" "), "short", {}, "'q2' has no answer"),
        (Question("q3", "Why?", choices=("a", "b")), "letter", {}, "'q3' has the answer index None"),
        (Question("q4", "Why?", choices=("a", "b"), answer_index=2), "letter", {}, "'q4'.*index 2 among 2"),
        (Question("q5", "Why?", answer="x"), "letter", {}, "'q5' has no choices"),
        (Question("q6", "<image>\nWhy?", answer="x"), "plain", {}, "'q6' holds the marker <image>"),
        (OPEN, "chatty", {}, "'chatty'; there are letter, short, plain"),
        (CHOICE, "letter", {"ocr": True}, "OCR tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(question, style, options, message):
    with pytest.raises(DataError, match=message):
        render(question, style, with_answer=True, **options)


def test_letters_end_with_z():
    assert [letter_of(i) for i in (0, 25)] == ["A", "Z"]
    for index in (-1, 26):
        with pytest.raises(DataError, match="no letter"):
            letter_of(index)
