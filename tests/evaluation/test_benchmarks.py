"""What a card makes of a question."""

from __future__ import annotations

import pytest

from mmkd.data.samples import Question


def test_what_an_answer_is_compared_with(benchmark_of) -> None:
    question = Question("1", "?", answer="b", references=("b",), choices=("a", "b"), answer_index=1)
    by_letter, by_words = benchmark_of(prompt_style="letter"), benchmark_of(prompt_style="short")
    assert by_letter.references(question) == ("B",)
    assert by_words.references(question) == ("b",)
    assert by_words.references(Question("2", "?")) == ()
    assert by_letter.references(Question("3", "?", choices=("a", "b"))) == ()
    of_both = benchmark_of(prompt_style="mmmu")
    assert of_both.references(question) == ("B",)
    assert of_both.references(Question("4", "?", answer="12")) == ("12",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "jsonlines"}, "there is no format 'jsonlines'; did you mean 'jsonl'"),
        ({"format": "llava"}, "format 'llava' holds samples, not questions"),
        ({"metric": "exact"}, "there is no metric 'exact'"),
        ({"also": ["anl"]}, "there is no metric 'anl'; did you mean 'anls'"),
        ({"parser": "lettre"}, "there is no parser 'lettre'; did you mean 'letter'"),
        ({"submission": "vqa"}, "there is no submission format 'vqa'; did you mean 'vqav2'"),
    ],
)
def test_names_that_are_not_registered_are_refused(benchmark_of, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark_of(**changes)
