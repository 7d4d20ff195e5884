"""ANLS, by hand."""

from __future__ import annotations

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.tasks.docvqa import anls


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ax"], 0.5),  # exactly one half counts
        ("abc", ["xyc"], 0.0),
        (" ABC ", ["abc"], 1.0),
        ("a  b", ["a b"], 0.75),  # inner spaces count
        ("", [""], 0.0),
        ("x", [""], 0.0),
        ("tea", ["coffee", "team"], 0.75),
        ("none", ["None"], 1.0),  # a word like others
        ("None", ["nine"], 0.75),
        ("none", ["42"], 0.0),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


def test_anls_without_references() -> None:
    with pytest.raises(DataError, match="at least one reference"):
        anls("x", [])
