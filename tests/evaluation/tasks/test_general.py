"""Scores that belong to no benchmark."""

from __future__ import annotations

from mmkd.evaluation.tasks.general import exact_match


def test_exact_match() -> None:
    assert exact_match(" Blue  whale\n", ["shark", "blue whale"]) == 1.0
    assert exact_match("blue whale.", ["blue whale"]) == 0.0
