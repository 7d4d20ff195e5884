"""POPE's parser and numbers."""

from __future__ import annotations

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.tasks.pope import pope, pope_parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No, there is none", "no"),
        ("Yes. No", "yes"),  # the first sentence only
        ("It is not", "no"),
        ("nothing", "yes"),
        ("NO", "yes"),
        ("", "yes"),
        ("well,no", "yes"),
        ("yes\nno", "yes"),  # only spaces part words
    ],
)
def test_pope_parse(text: str, expected: str) -> None:
    assert pope_parse(text) == expected


def test_pope() -> None:
    result = pope(["yes", "yes", "no", "No.", "Yes"], ["yes", "no", "no", "yes", "yes"])
    assert result == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    assert pope(["no"], ["no"])["f1"] == 0.0
    with pytest.raises(DataError, match="2 predictions for 1 labels"):
        pope(["yes", "no"], ["yes"])
    with pytest.raises(DataError, match="maybe"):
        pope(["yes"], ["maybe"])
