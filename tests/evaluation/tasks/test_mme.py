"""MME's parser and numbers."""

from __future__ import annotations

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.tasks.mme import mme, mme_parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YES!", "yes"),
        ("  no", "no"),
        ("   no", "other"),
        ("nose", "no"),
        ("I'd say yes", "other"),
        ("", "other"),
    ],
)
def test_mme_parse(text: str, expected: str) -> None:
    assert mme_parse(text) == expected


def test_mme() -> None:
    rows = [("a", "Yes", "Yes"), ("a", "no", "No"), ("b", "yes", "Yes"), ("b", "perhaps", "No")]
    result = mme({"color": rows, "count": rows[:2]})
    assert result["color"] == pytest.approx({"acc": 0.75, "acc_plus": 0.5, "score": 125.0})
    assert result["count"]["score"] == 200.0
    assert result["total"]["score"] == 325.0
    with pytest.raises(DataError, match="two questions an image"):
        mme({"color": rows[:3]})
