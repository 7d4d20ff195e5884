from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.statistics import agreement, compare_runs, modality_importance, verdict


def test_agreement() -> None:
    assert agreement(["Red ", "blue", None], ["red", "green", ""]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="1 against 2"):
        agreement(["a"], ["a", "b"])


# ---- runs
# ------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, scores: dict[str, float | None]) -> Path:
    rows = [
        {
            "id": name,
            "prediction": None if score is None else f"says {score}",
            "score": score,
            "images": [f"{name[:2]}.png"],
            "skipped": "image does not decode" if score is None else None,
        }
        for name, score in scores.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_scores(right: int, total: int = 200) -> dict[str, float | None]:
    return {f"{i:03d}": float(i < right) for i in range(total)}


def test_compare_runs(tmp_path: Path) -> None:
    paths = {
        "teacher": write_predictions(tmp_path / "t", make_scores(180)),
        "control": write_predictions(tmp_path / "c", make_scores(100)),
        "student": write_predictions(tmp_path / "s", make_scores(140)),
    }
    result = compare_runs(paths)
    assert result["models"]["teacher"]["score"] == 0.9
    assert list(result["differences"]) == ["student - control", "student - teacher", "control - teacher"]
    difference = result["differences"]["student - control"]
    assert difference["difference"] == pytest.approx(0.2)
    assert difference["agreement"] == pytest.approx(0.8)
    assert result["verdict"].startswith("student leads its control: +20.0 points [+")


def test_the_verdict_is_against_the_best_control(tmp_path: Path) -> None:
    paths = {
        "control": write_predictions(tmp_path / "c", make_scores(100)),
        "control_equal_compute": write_predictions(tmp_path / "e", make_scores(139)),
        "student": write_predictions(tmp_path / "s", make_scores(140)),
    }
    result = compare_runs(paths)
    assert result["best_control"] == "control_equal_compute"
    assert result["verdict"].startswith("student and control (equal compute) show no difference: +0.5 points")
    del paths["control"], paths["control_equal_compute"]
    assert compare_runs(paths)["best_control"] is None


def test_better_and_worse_are_said_only_where_they_are_shown(tmp_path: Path) -> None:
    paths = {
        "student": write_predictions(tmp_path / "s", make_scores(101)),
        "control": write_predictions(tmp_path / "c", make_scores(100)),
    }
    assert compare_runs(paths)["verdict"].startswith("student and control show no difference: ")
    assert verdict({"difference": -0.1, "ci95": [-0.15, -0.05]}) == "student is behind its control: -10.0 points [-15.0, -5.0]"
    assert "no control" in compare_runs({"student": paths["student"]})["verdict"]


def test_skipped_questions_are_left_out_for_all(tmp_path: Path) -> None:
    paths = {
        "student": write_predictions(tmp_path / "s", {"a": 1.0, "b": None, "c": 0.0}),
        "control": write_predictions(tmp_path / "c", {"a": 1.0, "b": 1.0, "c": 1.0}),
    }
    result = compare_runs(paths)
    assert (result["n"], result["n_skipped"]) == (2, 1)
    assert result["models"]["control"]["score"] == 1.0


def test_different_questions_are_refused(tmp_path: Path) -> None:
    paths = {
        "student": write_predictions(tmp_path / "s", {"a": 1.0, "b": 1.0}),
        "control": write_predictions(tmp_path / "c", {"a": 1.0, "x": 1.0, "y": 1.0}),
    }
    with pytest.raises(
        DataError, match=r"1 only in student \(first \['b'\]\), 2 only in control \(first \['x', 'y'\]\)"
    ):
        compare_runs(paths)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "s", {"a": 1.0})
    path.write_text(path.read_text(encoding="utf-8") + '{"id": "b"', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        compare_runs({"student": path})


def test_fidelity_and_where_the_student_beats_its_teacher(tmp_path: Path) -> None:
    paths = {
        "student": write_predictions(tmp_path / "s", {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.6}),
        "teacher": write_predictions(tmp_path / "t", {"a": 1.0, "b": 1.0, "c": 0.3, "d": 0.0}),
    }
    result = compare_runs(paths)
    pair = result["differences"]["student - teacher"]
    assert (pair["only_first"], pair["only_second"]) == (1, 1)
    assert result["student_beats_teacher"] == ["c"]
    assert result["fidelity"] == {"student": pair["agreement"]}
    assert "student_beats_teacher" not in compare_runs({"student": paths["student"]})


def test_which_questions_need_their_picture() -> None:
    def rows(*scores: float | None) -> dict[str, dict]:
        return {str(n): {"id": str(n), "score": s, "images": ["x.png"] if n < 5 else []} for n, s in enumerate(scores)}

    found = modality_importance(rows(1.0, 1.0, 0.0, 0.0, None, 1.0), rows(0.0, 1.0, 1.0, 0.3, 1.0, 0.0))
    assert found == {
        "n": 4, "both": 0.25, "needs_image": 0.25, "hurt_by_image": 0.25, "neither": 0.25,
        "blind_score": pytest.approx(2.3 / 4), "gain": pytest.approx(-0.3 / 4), "ids": ["0"],
    }  # fmt: skip
    assert modality_importance({}, {}) == {"n": 0}
    with pytest.raises(DataError, match="only in without"):
        modality_importance({}, rows(1.0))


def test_questions_without_a_score_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "prediction": "x", "score": None, "skipped": None}), encoding="utf-8")
    with pytest.raises(DataError, match="without a score"):
        compare_runs({"student": path})
