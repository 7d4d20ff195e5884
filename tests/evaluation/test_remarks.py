"""What is wrong with answers as a whole is said in words."""

import json

import pytest

from mmkd.evaluation.remarks import remarks
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.statistics import compare_runs
from mmkd.runs.run import table


def rows(answers, scores, references=("red",), **more):
    return [
        {"id": str(i), "prediction": a, "parsed": a or None, "score": s, "references": list(references), **more}
        for i, (a, s) in enumerate(zip(answers, scores, strict=True))
    ]


@pytest.mark.parametrize(
    ("answers", "scores", "wanted"),
    [
        (["red", "blue"] + [" "] * 118, [1.0] + [0.0] * 119, ["118 of 120 answers are empty"]),
        (["Yes"] * 97 + ["no"] * 3, [0.0, 1.0] * 50, ["one answer makes 97 % of 100: 'yes'"]),
        ([f"a {i}" for i in range(120)], [0.0] * 120, ["0 of 120 right"]),
        ([f"a {i}" for i in range(30)], [1.0] * 30, ["30 of 30 right"]),
        ([""] * 20, [0.0] * 20, ["20 of 20 answers are empty", "0 of 20 right"]),
        (["x"] * 12, [0.5] * 12, ["one answer makes 100 % of 12: 'x'"]),
        (["yes", "no"] * 30, [0.0, 1.0] * 30, []),
        (["a", ""], [0.0, 1.0], []),  # of so few nothing is said
        (["a", "b"], [0.0, 0.0], ["0 of 2 right"]),
    ],
)
def test_degenerate_answers(answers, scores, wanted):
    assert remarks(rows(answers, scores)) == wanted


def test_what_the_questions_ask_for_is_no_remark():
    assert remarks(rows(["red"] * 50, [1.0] * 49 + [0.9])) == []
    assert remarks([]) == []
    server = rows(["red"] * 40 + ["blue"] * 2, [None] * 42, references=())
    assert remarks(server) == ["one answer makes 95 % of 42: 'red'"]


def test_answers_that_end_within_their_thinking_are_no_answers_and_long_ones_are_cut():
    cut = {"thinking": "unclosed", "answer": None, "parsed": None}
    thinking = [row | cut for row in rows([f"<think>so {i}" for i in range(12)], [0.0] * 12)]
    assert remarks(thinking) == ["12 of 12 answers cannot be parsed", "0 of 12 right"]
    (said,) = remarks(rows(["many words " * 9] * 20, [0.0, 1.0] * 10))
    assert len(said) < 90 and said.endswith("…'")
    unparsed = [row | {"parsed": None} for row in rows([f"word {i}" for i in range(20)], [0.0, 1.0] * 10)]
    assert remarks(unparsed) == ["20 of 20 answers cannot be parsed"]


def test_comparisons_and_the_table_of_a_run_say_it(tmp_path):
    paths = {}
    for role, score in (("student", 0.0), ("control", 1.0)):
        lines = [json.dumps(row) for row in rows([f"{role} {i}" for i in range(15)], [score] + [0.0] * 14)]
        paths[role] = tmp_path / role
        paths[role].write_text("\n".join(lines) + "\n")
    found = compare_runs(paths)
    assert found["models"]["student"]["remarks"] == ["0 of 15 right"] and "remarks" not in found["models"]["control"]
    assert found["models"]["student"]["ci95"][1] > 0.1
    entry = {
        "n": 15, "parameters": {"student": 3}, "parameters_active": {"student": 3}, "student": 0.0, "student_ci95": [0.0, 0.2],
        "remarks": {"student": ["0 of 15 right"]},
    }  # fmt: skip
    assert "0 of 15 right" in table({"benchmarks": {"b": entry}, "seconds": 1.0})


def test_rows_with_a_score_alone_are_scores(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "score": 1.0 * (i % 2)}) + "\n" for i in range(15)))
    assert remarks(list(read_predictions(path).values())) == []
    assert compare_runs({"student": path, "control": path})["models"]["student"]["score"] == pytest.approx(7 / 15)
