from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mmkd.errors import DataError
from mmkd.evaluation.statistics import agreement, compare_runs, interval, modality_importance, paired_difference, verdict


def test_interval_of_right_and_wrong_is_the_binomial_one() -> None:
    mean, low, high = interval([1.0] * 300 + [0.0] * 100)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)


def test_interval_of_many_different_scores() -> None:
    scores = np.random.default_rng(0).normal(0.4, 0.1, 500)
    mean, low, high = interval(scores)
    half = 1.96 * scores.std() / np.sqrt(500)
    assert mean == pytest.approx(scores.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.001)


def test_interval_is_the_same_every_time_and_needs_no_spread() -> None:
    scores = [0.0, 0.3, 1.0, 0.6, 0.9]
    assert interval(scores) == interval(scores)
    assert interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_clusters_widen_the_interval() -> None:
    # Every question is there four times: a quarter of the information that the count suggests.
    scores = np.repeat(np.random.default_rng(1).integers(0, 2, 100).astype(float), 4)
    groups = np.repeat(np.arange(100), 4)
    _, low, high = interval(scores)
    mean, wide_low, wide_high = interval(scores, groups.tolist())
    assert (wide_high - wide_low) / (high - low) == pytest.approx(2.0, abs=0.15)
    assert mean == scores.mean()


def test_unequal_clusters_keep_the_mean_over_questions() -> None:
    mean, low, high = interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert mean == 0.75
    assert (low, high) == (0.0, 1.0)


def test_coverage() -> None:
    """The interval holds the true mean about 95 times in 100, with questions that go together by fives."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        scene = np.repeat(rng.beta(2, 2, 60), 5)
        scores = (rng.random(300) < scene).astype(float)
        _, low, high = interval(scores, np.repeat(np.arange(60), 5).tolist(), n_boot=1000)
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(0, 2, 400).astype(float)
    b = np.where(rng.random(400) < 0.1, 1 - a, a)
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(a.mean() - b.mean())
    assert high - low < 0.8 * (interval(a)[2] - interval(a)[1])


def test_memory_stays_bounded() -> None:
    scores = np.random.default_rng(4).random(5000)
    tracemalloc.start()
    interval(scores, n_boot=4000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        ([], None, "needs a list"),
        ([1.0, float("nan")], None, "not finite"),
        ([1.0], ["a", "b"], "1 scores but 2 groups"),
    ],
)
def test_interval_refuses(scores: list, groups: list | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        interval(scores, groups)


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
    assert result["verdict"].startswith("student leads its control by 20.0 points [+")


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
    assert verdict({"difference": -0.1, "ci95": [-0.15, -0.05]}) == "student is behind its control by 10.0 points [-15.0, -5.0]"
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
