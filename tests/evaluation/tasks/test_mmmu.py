"""MMMU's rules, by hand from the authors' script."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.mmmu import mmmu_open, mmmu_parse


@pytest.mark.parametrize(
    ("text", "references", "right"),
    [
        ("The answer is 12", ["12"], True),
        ("so x = 12.004", ["12.00"], True),  # numbers are rounded to two places
        ("1,200", ["1200"], True),
        ("12", ["120"], False),
        ("it is blue whale", ["whale"], True),
        ("b", ["b"], True),
        ("grade b it is done", ["b"], False),  # only what follows the last mark counts
        ("the grade is a b", ["b"], True),
        ("whale.", ["Whale", "fish"], True),
        ("", ["x"], False),
        ("nan", ["nan"], False),
    ],
)
def test_mmmu_open_questions(text: str, references: list[str], right: bool) -> None:
    assert mmmu_open(text, references) == float(right)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(A) or (C)", "C"),
        ("A (B)", "B"),  # brackets come first
        ("I say A not B here", "B"),
        ("B.", "B"),
        ("it must surely be the green one", "B"),
        ("green one", None),  # too short for the words of a choice
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(text: str, letter: str | None) -> None:
    assert mmmu_parse(text, ("red", "green", "blue")) == letter


def test_mmmu_leaves_open_answers_alone() -> None:
    assert mmmu_parse(" 12. ", ()) == " 12. "
