"""Forms of answers: what each reads, and what it refuses."""

import json

import pytest

from mmkd.data.samples import Question
from mmkd.writing.forms import FormError, FormSpec

CHOICES = Question("q", "which?", choices=("red", "dark blue"), answer_index=0)


def read(kind, text, question=CHOICES, **options):
    return FormSpec(kind=kind, **options).made().read(text, question)


@pytest.mark.parametrize(
    ("kind", "options", "text", "wanted"),
    [
        ("plain", {}, "a red\ncircle", "a red\ncircle"),
        ("plain", {"after": "Answer:"}, "Answer: no. Answer: red", "red"),
        ("plain", {"one_line": True}, "red", "red"),
        ("reasoned", {}, "It is round.\nAnswer: a circle", {"rationale": "It is round.", "answer": "a circle"}),
        ("letter", {}, "B", "dark blue"),
        ("letter", {}, "(b)", "dark blue"),
        ("letter", {}, "B.", "dark blue"),
        ("letter", {}, "B. Dark blue.", "dark blue"),
        ("letter", {}, "A: red", "red"),
        ("yes_no", {}, "Yes.", "yes"),
        ("json", {"fields": {"answer": "text"}}, '{"answer": "red"}', {"answer": "red"}),
        ("json", {"fields": {"answer": "text"}}, '```json\n{"answer": "red"}\n```', {"answer": "red"}),
        ("json", {"fields": {"n": "integer", "t": "truth"}}, '{"n": 2, "t": false}', {"n": 2, "t": False}),
        ("json", {"fields": {"x": "number"}}, '{"x": 1}', {"x": 1.0}),
        ("json", {"fields": {"l": ["text"], "k": ["a", "b"]}}, '{"l": ["x", "y"], "k": "b"}', {"l": ["x", "y"], "k": "b"}),
        ("json", {"fields": {"a": "text", "b?": "text"}}, '{"a": "x"}', {"a": "x"}),
        ("json", {"fields": {"a": "text", "b?": "text"}}, '{"a": "x", "b": null}', {"a": "x"}),
    ],
)  # fmt: skip
def test_what_is_read(kind, options, text, wanted):
    assert read(kind, text, **options) == wanted


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("plain", {"after": "Answer:"}, "it is red"),
        ("plain", {"after": "Answer:"}, "Answer:"),
        ("plain", {"one_line": True}, "red\nblue"),
        ("reasoned", {}, "a circle"),
        ("reasoned", {}, "Answer: a circle"),
        ("reasoned", {}, "It is round. Answer:"),
        ("letter", {}, "C"),
        ("letter", {}, "A or B"),
        ("letter", {}, "Because"),
        ("letter", {}, "B. red"),
        ("letter", {}, "the letter B"),
        ("yes_no", {}, "yes and no"),
        ("json", {"fields": {"answer": "text"}}, '{"answer": "red"'),
        ("json", {"fields": {"answer": "text"}}, 'Sure! {"answer": "red"}'),
        ("json", {"fields": {"answer": "text"}}, '["red"]'),
        ("json", {"fields": {"answer": "text"}}, '{"answer": 3}'),
        ("json", {"fields": {"answer": "text"}}, '{"answer": " "}'),
        ("json", {"fields": {"answer": "text"}}, '{"answer": null}'),
        ("json", {"fields": {"answer": "text"}}, '{"answer": "red", "label": "blue"}'),
        ("json", {"fields": {"answer": "text"}}, '{"answer": "red", "answer": "blue"}'),
        ("json", {"fields": {"answer": "text"}}, '{"reply": "red"}'),
        ("json", {"fields": {"x": "number"}}, '{"x": NaN}'),
        ("json", {"fields": {"x": "number"}}, '{"x": 1e999}'),
        ("json", {"fields": {"n": "integer"}}, '{"n": "2"}'),
        ("json", {"fields": {"k": ["a", "b"]}}, '{"k": "c"}'),
        ("json", {"fields": {"l": ["text"]}}, '{"l": []}'),
        ("json", {"fields": {"answer": "text"}}, "[" * 60_000),
        ("json", {"fields": {"answer": "text"}}, json.dumps({"answer": "x" * 70_000})),
    ],
)  # fmt: skip
def test_what_is_refused_names_no_content(kind, options, text):
    with pytest.raises(FormError) as caught:
        read(kind, text, **options)
    assert "red" not in str(caught.value) and len(str(caught.value)) < 100


def test_letters_need_choices():
    with pytest.raises(FormError, match="no choices"):
        read("letter", "A", Question("q", "what?"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"kind": "jason"}, "there is no form of answers 'jason'; did you mean"),
        ({"kind": "json"}, "fields: name at least one"),
        ({"kind": "json", "fields": {"a": "txt"}}, "fields.a: 'txt' is no type; did you mean"),
        ({"kind": "json", "fields": {"a b": "text"}}, "is no name"),
        ({"kind": "plain", "behind": "x"}, "plain has no option 'behind'"),
        ({"kind": "plain", "one_line": "perhaps"}, "one_line"),
    ],
)
def test_a_wrong_form_is_said(spec, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        FormSpec(**spec)
