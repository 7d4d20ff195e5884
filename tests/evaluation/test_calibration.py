"""Numbers of calibration, worked out by hand and simulated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.calibration import (
    area_under_risk,
    calibration,
    calibration_error,
    most_common,
    nll_difference,
    probabilities,
    score_of_surest,
)
from mmkd.evaluation.report import build_report
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.statistics import compare_runs
from mmkd.sample.sample_set import write_sample_set
from mmkd.towers.likelihood import TEMPERATURES
from mmkd.towers.tower import Tower


def choice(name: str, logits: list[float], right: str, group: str = "", score: float = 0.0) -> dict:
    return {"id": name, "likelihood": {"choices": logits}, "references": [right], "score": score, "group": group or name}


def words(name: str, own: float, reference: float, score: float) -> dict:
    """A short answer whose log-probabilities do not depend on the temperature."""
    kept = {"own": [own] * len(TEMPERATURES), "reference": [reference] * len(TEMPERATURES)}
    return {"id": name, "likelihood": kept, "references": ["x"], "score": score, "group": name}


def drawn(n: int, sharpness: float = 1.0, seed: int = 0, options: int = 3) -> list[dict]:
    """Questions whose right choice is drawn from the softmax of logits, which the model then gives `sharpness` times as large."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        logits = rng.normal(0, 2, options)
        shares = np.exp(logits) / np.exp(logits).sum()
        rows.append(choice(f"q{number}", (sharpness * logits).tolist(), "ABC"[rng.choice(options, p=shares)], f"p{number // 2}"))
    return rows


def test_of_choices_and_of_words() -> None:
    rows = [choice("a", [math.log(3), 0.0], "A"), choice("b", [math.log(3), 0.0], "B")]
    rows.append(words("c", math.log(0.5), math.log(0.1), 0.3))
    found = calibration(rows)
    assert found["n"] == 3 and found["choices"] == 2
    assert found["score"] == pytest.approx((1 + 0 + 0.3) / 3)
    assert found["nll"]["value"] == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.1)) / 3)
    # bins: 0.75 holds two with a score of 1/2, 0.5 one with 0.3
    assert found["ece"]["value"] == pytest.approx((2 * 0.25 + 0.2) / 3)


def test_calibration_error_by_hand() -> None:
    confidence, right = np.array([0.99, 0.99, 0.4, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    assert calibration_error(confidence, right) == pytest.approx((abs(2.98 - 2) + 0.6) / 4)


def test_surest_third_and_area_by_hand() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert score_of_surest(confidence, right) == 0.5
    shares = [1, 1 / 2, 2 / 3, 3 / 4, 3 / 5, 1 / 2]
    assert area_under_risk(confidence, right) == pytest.approx(1 - sum(shares) / 6)
    assert area_under_risk(np.ones(6), right) == pytest.approx(0.5)  # who is equally sure of everything orders nothing
    assert score_of_surest(np.ones(6), right[::-1].copy()) == 0.5


def test_the_temperature_mends_a_model_that_is_too_sure_and_is_never_fitted_on_what_it_scores() -> None:
    rows = drawn(1200, sharpness=4.0)
    found = calibration(rows)
    after = found["after_temperature"]
    assert 3.3 <= after["temperature"] <= 4.8
    assert found["ece"]["value"] > 0.1 > 0.05 > after["ece"]["value"]
    assert after["nll"]["value"] < found["nll"]["value"] - 0.3
    table = probabilities(rows)
    folds, fitted = table.folds, table.fitted()
    assert len(set(folds)) == 5
    for fold in set(folds):
        assert {*fitted[folds == fold]} == {int(table.nll[folds != fold].mean(0).argmin())}
    pictures = {group: {*folds[[g == group for g in table.groups]]} for group in table.groups}
    assert all(len(parts) == 1 for parts in pictures.values())  # no picture in two parts


def test_one_picture_alone_fits_nothing() -> None:
    rows = [choice("a", [9.0, 0.0], "B", "p"), choice("b", [9.0, 0.0], "B", "p")]
    found = calibration(rows)
    assert found["after_temperature"]["nll"]["value"] == pytest.approx(found["nll"]["value"])
    assert found["ece"]["ci95"] == [0.0, 1.0]


def test_intervals_hold_the_truth() -> None:
    """Of 60 draws; binomially, 48 or fewer of 60 at 95 % come once in ten thousand."""
    truth = calibration(drawn(40_000, sharpness=3.0, seed=99))
    held = dict.fromkeys(("nll", "ece", "most_confident_third", "aurc"), 0)
    for seed in range(60):
        found = calibration(drawn(300, sharpness=3.0, seed=seed))
        for key in held:
            low, high = found[key]["ci95"]
            held[key] += low <= truth[key]["value"] <= high
    assert min(held.values()) >= 49, held


def test_paired_difference_of_nll() -> None:
    sharp, flat = drawn(600, sharpness=4.0, seed=3), drawn(600, sharpness=1.0, seed=3)
    found = nll_difference(probabilities(flat), probabilities(sharp))
    assert found["n"] == 600 and found["ci95"][1] < 0
    low, high = found["after_temperature"]["ci95"]
    assert abs(found["after_temperature"]["difference"]) < 0.02 and high - low < 0.05  # a temperature tells them apart alone
    assert nll_difference(probabilities(flat), None) is None
    part = nll_difference(probabilities(flat[:10]), probabilities(sharp[5:]))
    assert part["n"] == 5


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "references": ["A"], "score": 1.0},
        choice("a", [1.0, 2.0], "a cat"),
        choice("a", [1.0], "A"),
        {**words("a", 0.0, 0.0, 1.0), "references": []},
        {**words("a", 0.0, 0.0, 1.0), "score": None},
        {"id": "a", "references": ["x"], "score": 1.0, "likelihood": {"own": [0.0], "reference": [0.0]}},
    ],
)
def test_questions_without_probabilities_are_left_out(row: dict) -> None:
    assert probabilities([row]) is None and calibration([row]) is None


def test_most_common() -> None:
    assert most_common(["b", "a", "a", "b", "c"]) == "b" and most_common([]) is None


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with teacher, hard answers, control and student on the sample's two forms; two models play four roles."""
    root = tmp_path_factory.mktemp("run")
    write_sample_set(root / "sample", sizes={"train": 1, "val": 1, "test": 12})
    towers = {name: Tower.load(f"models/sample-{name}") for name in ("teacher", "student")}
    for role, model in {"teacher": "teacher", "hard_answers": "student", "control": "student", "student": "teacher"}.items():
        for name in ("sample_scienceqa", "sample_textvqa"):
            out = root / "evaluation" / role / name
            evaluate(towers[model], load_benchmark(name), out, data_root=root / "sample", progress=False)
    return root


def test_evaluation_keeps_and_tells_them(run: Path) -> None:
    for name, lettered in (("sample_scienceqa", True), ("sample_textvqa", False)):
        folder = run / "evaluation" / "teacher" / name
        results = json.loads((folder / "results.json").read_text())
        rows = [*read_predictions(folder / "predictions.jsonl").values()]
        found = results["calibration"]
        assert found["n"] == len(rows) == results["n"] and found["choices"] == lettered * len(rows)
        for key in ("nll", "ece", "most_confident_third", "aurc"):
            low, high = found[key]["ci95"]
            assert low <= found[key]["value"] <= high
        assert found["curve"][-1] == [1.0, pytest.approx(found["score"], abs=1e-4)]
        assert found["score"] == pytest.approx(results["score"])  # the teacher answers by the likeliest letter
        assert found["most_confident_third"]["value"] > results["score"] or results["score"] > 0.9
    assert "hint" not in rows[0]


def test_scored_again_nothing_is_asked_and_all_is_there(run: Path, monkeypatch) -> None:
    folder = run / "evaluation" / "teacher" / "sample_textvqa"
    before = json.loads((folder / "results.json").read_text())
    tower = Tower.load("models/sample-teacher")
    monkeypatch.setattr(tower, "answer_with_likelihood", None)
    again = evaluate(tower, load_benchmark("sample_textvqa"), folder, data_root=run / "sample", progress=False)
    assert again["calibration"] == before["calibration"]


def test_by_likelihood_gives_the_same_probabilities(run: Path, tmp_path: Path) -> None:
    tower = Tower.load("models/sample-teacher")
    found = evaluate(
        tower, load_benchmark("sample_scienceqa"), tmp_path, data_root=run / "sample", progress=False, choices="likelihood"
    )
    generated = json.loads((run / "evaluation/teacher/sample_scienceqa/results.json").read_text())["calibration"]
    assert found["calibration"]["nll"]["value"] == pytest.approx(generated["nll"]["value"], abs=1e-3)


def test_comparison_and_page_show_them(run: Path) -> None:
    paths = {p.parent.parent.name: p for p in sorted(run.glob("evaluation/*/sample_scienceqa/predictions.jsonl"))}
    compared = compare_runs(paths)
    found = compared["differences"]["student - control"]["nll"]
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1] < 0
    assert compared["differences"]["student - teacher"]["nll"]["difference"] == 0.0
    assert compared["over_hard_answers"].count("NLL -") == 1 and "better" in compared["over_hard_answers"]
    page = build_report(run).read_text()
    assert 'id="probabilities"' in page and "surest third right" in page
    assert page.count('aria-label="share that is right over the share of the questions answered') == 2


@pytest.mark.parametrize("wrong", ["x", {"choices": "x"}, {"choices": []}, {"own": [True]}, {"own": [1e999]}, [1.0]])
def test_damaged_likelihoods_are_refused(run: Path, tmp_path: Path, wrong) -> None:
    row = {"id": "a", "prediction": "x", "score": 1.0, "likelihood": wrong}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="likelihood"):
        read_predictions(path)
