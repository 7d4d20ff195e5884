"""A-OKVQA's direct answers."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.aokvqa import aokvqa_accuracy


def test_aokvqa_counts_equal_answers() -> None:
    answers = ["cat", "cat", "dog", "Cat"]
    assert aokvqa_accuracy("cat", answers) == pytest.approx(2 / 3)
    assert aokvqa_accuracy("CAT", answers) == 0.0
