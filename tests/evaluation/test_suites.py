"""Suites: which number of each benchmark counts, and the averages that papers print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import CARDS
from tiny import tiny_tower

from mmkd.base.cards import list_cards
from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.evaluation.benchmarks import SUITES, load_benchmark
from mmkd.evaluation.suites import average, load_suite, server_scores


def names() -> list[str]:
    return [name.removeprefix(SUITES) for name in list_cards("evaluation") if name.startswith(SUITES)]


def test_every_suite_is_valid() -> None:
    assert names() == ["llava_kd_10", "llava_kd_7", "switch_kd_6"]
    for name in names():
        suite = load_suite(name)
        assert suite.notes and [b.name for b in suite.benchmarks()] == [part.benchmark for part in suite.parts]


@pytest.mark.parametrize("name", ["llava_kd_10", "llava_kd_7"])
def test_the_published_parts_give_the_published_average(name: str) -> None:
    """Seven or ten cards cite the parts, the suite's card the average; one number that was copied wrongly would show."""
    suite = load_suite(name)
    wanted = {score.model: score.score for score in suite.reference_scores}
    assert len(wanted) >= 3
    for model, mean in wanted.items():
        parts = {b.name: {s.model: s.score for s in b.reference_scores}[model] for b in suite.benchmarks()}
        assert average(suite, {}, parts)["average"] == pytest.approx(mean, abs=0.055), model


def test_values_and_scales() -> None:
    suite = load_suite("switch_kd_6")
    results = {
        "mme": {"score": 0.9, "mme": {"perception": {"score": 1400.0}}},
        "mmbench_en": {"score": 0.9, "mmbench": {"circular": 0.6}},
        "gqa": {"score": 0.6},
        "scienceqa": {"score": 0.9, "scienceqa": {"image": {"score": 0.7}}},
        "textvqa_ocr": {"score": None},
        "pope": {"pope": {"f1_mean": 0.85}},
    }
    found = average(suite, results, {})
    assert found["values"] == pytest.approx(
        {"mme": 70.0, "mmbench_en": 60.0, "gqa": 60.0, "scienceqa": 70.0, "textvqa_ocr": None, "pope": 85.0}
    )
    assert found["missing"] == ["textvqa_ocr"] and found["average"] is None
    found = average(suite, results, {"textvqa_ocr": 45.0})
    assert found["average"] == pytest.approx(65.0) and found["from_server"] == ["textvqa_ocr"]


@pytest.mark.parametrize("text", ["vqav3=1", "vqav2", "vqav2=x", "vqav2=101", "vqav2=nan"])
def test_server_scores_are_checked(text: str) -> None:
    suite = load_suite("llava_kd_10")
    assert server_scores("vqav2=77.7, vizwiz=41.5", suite) == {"vqav2": 77.7, "vizwiz": 41.5}
    with pytest.raises(DataError, match="is not BENCHMARK=PERCENT"):
        server_scores(text, suite)


def test_a_suite_is_no_benchmark() -> None:
    with pytest.raises(DataError, match="--suite llava_kd_7"):
        load_benchmark("llava_kd_7")


def test_a_suite_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_tower().save(tmp_path / "model")
    for card in ("mme", "gqa"):
        root = tmp_path / load_benchmark(card).root
        root.mkdir()
        CARDS[card][0](root)
    card = tmp_path / "mine.yaml"
    card.write_text("title: mine\nparts: [{benchmark: gqa}, {benchmark: vqav2}, {benchmark: pope}]\n", encoding="utf-8")
    model, out = tmp_path / "model", tmp_path / "out"
    command = ["evaluate", str(model), "--suite", str(card), "--data-root", str(tmp_path), "--output", str(out)]
    assert main(command) == 2
    refused = capsys.readouterr().err
    assert "vqav2" in refused and "pope" in refused  # all that is missing, at once
    assert main([*command, "--server-scores", "vqav2=77.5,pope=80", "--importance"]) == 0
    assert "right only with it" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "suite.json").read_text(encoding="utf-8"))
    results = json.loads((tmp_path / "out" / "gqa" / "results.json").read_text(encoding="utf-8"))
    assert content["average"] == pytest.approx((100 * results["score"] + 77.5 + 80) / 3)
    assert results["importance"]["n"] == 2
