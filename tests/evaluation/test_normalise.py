"""The official scorers' plain forms of answers, by hand."""

from __future__ import annotations

import pytest

from mmkd.evaluation.normalise import normalise_evalai, normalise_vqav2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog!", "dog"),
        ("an apple, a pear", "apple pear"),
        ("seven", "7"),
        ("None", "0"),
        ("red/green", "red green"),  # no space beside the mark: it becomes one
        ("red / green", "red green"),  # a space beside it: it goes
        ("re-do 1,5", "redo 15"),  # a comma between digits removes every mark
        ("re-do 15", "re do 15"),
        ("2.5 km.", "2.5 km"),
        ("3:15 o'clock", "3:15 o'clock"),  # colon and apostrophe are no punctuation here
        ("youve", "you've"),
        ("shouldntve", "shouldntve"),  # only one apostrophe may be missing
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("." * 40, "." * 8),  # only 32 periods are removed
        ("\tx \n y ", "x y"),
    ],
)
def test_normalise_vqav2(text: str, expected: str) -> None:
    assert normalise_vqav2(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bob's  car", "bob 's car"),
        ("1,5/7", "15 7"),  # the comma is gone before marks are looked at, so the slash becomes a space
        ("what?!", "what"),
        ("wheres", "where's"),
        ("'tis", "'tis"),
        ("u.k.", "uk"),
    ],
)
def test_normalise_evalai(text: str, expected: str) -> None:
    assert normalise_evalai(text) == expected
