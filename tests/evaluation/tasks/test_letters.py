"""Letters: the strict rule and its quirks, and what a reader would take."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.gqa import gqa_parse
from mmkd.evaluation.tasks.letters import scienceqa_index, scienceqa_parse, scienceqa_parse_lenient
from mmkd.evaluation.tasks.seed import letter_exact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        ("C.", None),
        ("C. because", "C"),
        ("C ", None),
        ("c", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),  # one more character is needed
        ("The answer is C?", "C"),
        ("The answer is Cats.", "C"),  # any character will do
        ("The answer is C.\nThe answer is C.", None),
        ("the answer is C.", None),
        ("The answer is Z.", "Z"),
        ("E", "E"),
        ("F", None),
        ("", None),
        (None, None),
    ],
)
def test_scienceqa_strict(text: str | None, expected: str | None) -> None:
    assert scienceqa_parse(text, 4) == expected


def test_a_letter_beyond_the_choices_is_parsed_and_wrong() -> None:
    assert scienceqa_parse("D", 2) == "D"
    assert scienceqa_index("D", 2) == -1
    assert scienceqa_index("B", 2) == 1
    assert scienceqa_index(None, 2) == -1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B Explanation: it is cold", "B"),
        ("(c) a dog", "C"),
        ("**B**", "B"),
        ("b", "B"),
        ("Answer: (C)", "C"),
        ("I think the answer is B, since ...", "B"),
        ("The answer is A. The answer is B.", None),
        ("The answer is A. So the answer is B.", "A"),  # the strict rule finds one: it stands
        ("The answer is B. Yes, the answer is B.", "B"),
        ("A dog is barking", None),  # an article
        ("A", "A"),
        ("The answer is a dog", None),
        ("north pole", "C"),  # the words of the third choice
        ("It cannot be said.", None),
        ("D", None),  # beyond the choices
        ("Because of the cold", None),
    ],
)
def test_scienceqa_lenient(text: str, expected: str | None) -> None:
    assert scienceqa_parse_lenient(text, 3, ["sea", "land", "North Pole."]) == expected


def test_letters_alone_and_gqa() -> None:
    assert [letter_exact(text, 2) for text in ("A", "B", "C", "A.", "", "AB")] == ["A", "B", None, None, None, None]
    assert gqa_parse("Yes..") == "yes"
