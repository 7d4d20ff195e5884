"""Answers with thinking: scored by what follows it, in every number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import write_chair_coco, write_docvqa_test

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.results import read_predictions

OTHER = "<think>Is it 3? It may be 9.</think>"


@pytest.fixture
def ask(data: Path, tmp_path: Path):
    def run(tower, benchmark, **options) -> tuple[dict, dict]:
        found = evaluate(tower, benchmark, tmp_path / "out", progress=False, **{"data_root": data} | options)
        return found, read_predictions(tmp_path / "out" / "predictions.jsonl")

    return run


def test_shares_and_rows(ask, benchmark_of, fake_tower, caplog) -> None:
    said = {"red-1": f"{OTHER}\n1", "red-2": "or 5</think>2", "red-3": "<think>3", "red-4": f"{OTHER}5"}
    results, rows = ask(fake_tower(said), benchmark_of())
    assert results["score"] == 30 / 32 and results["unparsed_share"] == 1 / 32
    assert (results["thinking_share"], results["unclosed_thinking_share"]) == (3 / 32, 1 / 32)
    assert {key: rows["red-1"][key] for key in ("prediction", "thinking", "answer", "parsed", "score")} == {
        "prediction": f"{OTHER}\n1", "thinking": "closed", "answer": "1", "parsed": "1", "score": 1.0,
    }  # fmt: skip
    assert [rows["red-3"][key] for key in ("thinking", "answer", "parsed", "score")] == ["unclosed", None, None, 0.0]
    assert "thinking" not in rows["red-5"]
    assert "1 of 32 answers end within their thinking" in caplog.text and "max_new_tokens is 16" in caplog.text


def test_a_prompt_that_opens_thinking(ask, benchmark_of, fake_tower) -> None:
    tower = fake_tower({"red-1": "It is 1. </think> 1", "red-2": "2"})
    tower.opens_thinking = lambda sample: sample.turns[-1].role == "user"
    results, rows = ask(tower, benchmark_of())
    assert rows["red-1"]["score"] == 1.0 and rows["red-2"]["thinking"] == "unclosed"
    assert results["score"] == 1 / 32 and results["unclosed_thinking_share"] == 31 / 32


def test_letters_by_likelihood_have_no_thinking(ask, data: Path, benchmark_of, fake_tower) -> None:
    rows = [{"id": str(n), "question": "Which?", "choices": ["x", "y"], "answer": "y"} for n in range(4)]
    (data / "tiny" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tower = fake_tower({str(n): "B" for n in range(4)})
    tower.opens_thinking = lambda sample: True
    card = benchmark_of(prompt_style="letter", parser="letter", metric="accuracy", text_only=True)
    assert ask(tower, card, choices="likelihood")[0]["score"] == 1.0


def test_pope_and_mme(ask, data: Path, benchmark_of, fake_tower) -> None:
    rows = [
        {"id": f"{i}", "image": f"{i // 2}.png", "question": "Is it?", "answer": answer, "categories": {"task": "color"}}
        for i, answer in enumerate(["yes", "no", "yes", "no"])
    ]
    (data / "tiny" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tower = fake_tower({"0": "<think>not</think>yes", "1": "[THINK]yes[/THINK]No", "2": "yes", "3": "<think>no, since"})
    pope = ask(tower, benchmark_of(parser="pope", metric="pope", categories=[]))[0]
    assert pope["score"] == pope["pope"]["accuracy"] == 0.75 and pope["pope"]["yes_ratio"] == 0.5
    mme = ask(tower, benchmark_of(parser="mme", metric="mme", categories=[]))[0]
    assert mme["mme"]["color"] == {"acc": 0.75, "acc_plus": 0.5, "score": 125.0}


def test_chair(tmp_path: Path, ask, fake_tower) -> None:
    write_chair_coco(tmp_path / "coco")
    tower = fake_tower({"42": "<think>A bottle?</think>A dog.", "7": "<think>A dog"})
    results = ask(tower, load_benchmark("chair_coco"), data_root=tmp_path)[0]
    assert results["score"] == 0.5 and results["chair"]["chair_s"] == 0.0 and results["chair"]["mentions"] == 1
    tower = fake_tower({"42": "<think>", "7": "<think>"}, name="another")
    assert "chair" not in ask(tower, load_benchmark("chair_coco"), data_root=tmp_path)[0]


def test_servers_get_the_answer_alone(tmp_path: Path, ask, fake_tower) -> None:
    card = load_benchmark("docvqa_test")
    write_docvqa_test(tmp_path / card.root)
    results, _ = ask(fake_tower({"7": "<think>Smith?</think>Ann", "8": "<think>"}), card, data_root=tmp_path, submission=True)
    rows = json.loads((tmp_path / "out" / "submission.json").read_text(encoding="utf-8"))
    assert [row["answer"] for row in rows] == ["Ann", ""]
    assert (results["score"], results["thinking_share"], results["unclosed_thinking_share"]) == (None, 0.5, 0.5)
