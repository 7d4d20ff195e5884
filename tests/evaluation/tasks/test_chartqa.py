"""ChartQA's relaxed accuracy, by hand."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.chartqa import relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("10.5", "10", 1.0),
        ("10.51", "10", 0.0),
        ("-9.5", "-10", 1.0),
        ("0.2", "20%", 1.0),
        ("20", "20%", 0.0),
        ("0", "0.0", 0.0),  # a target of zero needs the same string
        ("0.0", "0.0", 1.0),
        ("2,000", "2000", 0.0),
        ("NORTH", "north", 1.0),
        ("nan", "nan", 0.0),
        ("1e2", "100", 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == expected


def test_relaxed_accuracy_takes_the_best_reference() -> None:
    assert relaxed_accuracy("7", ["six", "7.1"]) == 1.0
