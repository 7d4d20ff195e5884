"""ChartQA's relaxed accuracy, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.tasks.chartqa import relaxed_accuracy, relaxed_accuracy_lenient


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


@pytest.mark.parametrize(
    ("prediction", "reference", "official", "lenient"),
    [
        ("No.", "No", 0, 1),
        ("yes, it does", "Yes", 0, 1),
        ("Yes", "No", 0, 0),
        ("It does.", "Yes", 0, 0),
        ("2,000", "2000", 0, 1),
        ("2,000", "2,000", 1, 1),
        ("The answer is 41.", "40", 0, 1),
        ("Answer: **Sweden**", "Sweden", 0, 1),
        ("$12.5", "12.5", 0, 1),
        ("20", "20%", 0, 1),
        ("0.2", "20%", 1, 1),
        ("0", "0.0", 0, 1),
        ("35", "20", 0, 0),
        ("Swedes", "Sweden", 0, 0),
        ("", "0", 0, 0),
    ],
)
def test_the_readers_score_beside_the_official_one(prediction: str, reference: str, official: float, lenient: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == official
    assert relaxed_accuracy_lenient(prediction, [reference]) == lenient


def test_both_scores_stand_in_the_results(data: Path, tmp_path: Path, benchmark_of, fake_tower) -> None:
    rows = [{"id": str(n), "question": "?", "answer": answer} for n, answer in enumerate(["Yes", "No", "No", "1200", "Art"])]
    (data / "tiny" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tower = fake_tower({"0": "Yes.", "1": "It does not.", "2": "perhaps", "3": "1,200"})
    card = benchmark_of(metric="relaxed_accuracy", text_only=True)
    found = evaluate(tower, card, tmp_path / "out", data_root=data, progress=False)
    assert (found["score"], found["score_lenient"]) == (1 / 5, 4 / 5)
    assert found["ci95_lenient"][0] < 4 / 5 <= found["ci95_lenient"][1]
    assert found["neither_share"] == 1 / 3  # of the questions whose answer is yes or no
    card = benchmark_of(split="test", parser="identity", text_only=True)
    other = evaluate(fake_tower(), card, tmp_path / "b", data_root=data, progress=False)
    assert "neither_share" not in other and "score_lenient" not in other
