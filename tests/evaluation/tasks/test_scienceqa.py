"""ScienceQA's break-down."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.scienceqa import scienceqa


def test_scienceqa_breakdown() -> None:
    def row(score: float, modality: str, subject: str, grades: str, parsed: str | None = "A") -> dict:
        labels = {"modality": modality, "subject": subject, "grades": grades}
        return {"score": score, "parsed": parsed, "categories": labels}

    rows = [
        row(1, "image", "natural science", "1-6"),
        row(0, "image", "natural science", "7-12", None),
        row(1, "text", "language science", "1-6"),
    ]
    result = scienceqa(rows)
    assert result["all"] == pytest.approx({"n": 3, "score": 2 / 3, "unparsed_share": 1 / 3})
    assert result["image"] == {"n": 2, "score": 0.5, "unparsed_share": 0.5}
    assert result["grades 7-12"]["score"] == 0.0
    assert set(result) == {
        "all",
        "image",
        "text",
        "natural science",
        "language science",
        "grades 1-6",
        "grades 7-12",
    }
