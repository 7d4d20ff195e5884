"""`mmkd compare`: what may be compared, under which names, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import Page

from mmkd.cli import main
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.statistics import RIGHT


@pytest.fixture
def answered(tmp_path: Path, data: Path, benchmark_of, fake_tower):
    """Writes an evaluation with wrong answers to some questions, below a folder."""

    def write(folder: str, wrong: list[str], fingerprint: str = "", **options) -> Path:
        tower = fake_tower(dict.fromkeys(wrong, "wrong"), fingerprint or folder)
        evaluate(tower, benchmark_of(), tmp_path / folder / "tiny", data_root=data, progress=False, **options)
        return tmp_path / folder

    return write


def run(tmp_path: Path, *models: object) -> dict:
    assert main(["compare", *map(str, models), "--output", str(tmp_path / "compared"), "--title", "Two <b> runs"]) == 0
    return json.loads((tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8"))


def test_models_with_a_teacher(answered, tmp_path: Path, capsys) -> None:
    teacher = answered("teacher", ["red-1", "red-2"])
    good, bad = answered("good", ["red-1"]), answered("bad", [f"blue-{i}" for i in range(10)])
    found = run(tmp_path, teacher, f"small={good}", bad)
    comparison = found["benchmarks"]["tiny"]
    assert list(comparison["models"]) == ["teacher", "small", "bad"]
    assert comparison["beats_teacher"] == {"small": ["red-2"], "bad": ["red-1", "red-2"]}
    assert comparison["fidelity"]["small"] == pytest.approx(31 / 32)
    # Paired numbers again, from the rows.
    rows = {name: read_predictions(folder / "tiny" / "predictions.jsonl") for name, folder in (("small", good), ("bad", bad))}
    scores = [[row["score"] for row in rows[name].values()] for name in ("small", "bad")]
    pair = comparison["differences"]["small - bad"]
    assert pair["difference"] == pytest.approx(sum(a - b for a, b in zip(*scores, strict=True)) / 32)
    assert pair["only_first"] == sum(a >= RIGHT > b for a, b in zip(*scores, strict=True)) == 10
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1]

    out = capsys.readouterr().out
    assert "small - bad" in out and "answers as the teacher 96.9 %, right where it is not 1" in out
    page = Page((tmp_path / "compared" / "report.html").read_text(encoding="utf-8"))
    words = page.words()
    assert "The highest score beside the teacher's: small on 1 of 1." in words
    assert "Two <b> runs" in words and "Head to head" in words
    radios = {attrs["id"] for tag, attrs in page.tags if tag == "input"}
    assert {"m-m0-right", "m-m0-wrong", "m-m1-right", "m-m1-wrong", "m-teacher-all"} <= radios
    marks = [attrs["class"].split() for tag, attrs in page.tags if tag == "article"]
    assert sum("m1-wrong" in classes for classes in marks) > 0


def test_runs_share_their_teacher(answered, tmp_path: Path) -> None:
    for number, wrong in enumerate(("red-1", "green-2")):
        answered(f"run{number}/evaluation/teacher", [], "big")
        answered(f"run{number}/evaluation/student", [wrong])
        answered(f"run{number}/evaluation_blind/student", [], blind=True)
        (tmp_path / f"run{number}" / "log").mkdir()
        lines = [json.dumps({"stage": "a", "step": step, "loss": number + 1 / step}) for step in range(1, 9)]
        (tmp_path / f"run{number}" / "log" / "student.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = run(tmp_path, tmp_path / "run0", f"other={tmp_path / 'run1'}")
    assert list(found["models"]) == ["teacher", "run0 student", "other student"]
    page = Page((tmp_path / "compared" / "report.html").read_text(encoding="utf-8"))
    assert "run0 student ends at" in page.words() and "other student ends at" in page.words()
    assert "without pictures: 100.0 %" in page.words()
    alone = run(tmp_path, tmp_path / "run0")
    assert list(alone["models"]) == ["teacher", "student"]


def test_differences_have_one_sign_however_models_are_named(answered, tmp_path: Path, capsys) -> None:
    """The student's right answers count for it in a run's own comparison, among several runs, and among folders."""
    six = [f"red-{i}" for i in range(1, 7)]
    wrong = {"teacher": [], "control": six, "hard_answers": six[:2], "student": six[:1]}
    for number in (0, 1):
        for role, names in wrong.items():
            answered(f"run{number}/evaluation/{role}", names, "big" if role == "teacher" else "")
    alone, several = run(tmp_path, tmp_path / "run0"), run(tmp_path, tmp_path / "run0", tmp_path / "run1")
    folders = run(tmp_path, *(tmp_path / "run0" / "evaluation" / role for role in ("control", "teacher", "student")))
    for found, key in ((alone, "student - control"), (several, "run0 student - run1 control"), (folders, "student - control")):
        assert found["benchmarks"]["tiny"]["differences"][key]["difference"] == pytest.approx(5 / 32)
    order = list(dict.fromkeys(key.partition(" - ")[0] for key in several["benchmarks"]["tiny"]["differences"]))
    assert order == [f"run{n} {role}" for role in ("student", "hard_answers", "control") for n in (0, 1)]  # of the teacher: none
    assert f"{'run1 student - run0 control':<28}" in capsys.readouterr().out


def test_many_models_show_differences_with_the_first(answered, tmp_path: Path) -> None:
    folders = [answered(f"model{i}", [f"red-{j}" for j in range(i)]) for i in range(6)]
    found = run(tmp_path, *folders)
    assert len(found["benchmarks"]["tiny"]["differences"]) == 15
    text = (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")
    assert text.count('class="pair ') == 5


def test_models_without_a_common_benchmark_are_said_to_be_so(answered, tmp_path: Path, capsys) -> None:
    one, other = answered("one", []), answered("other", [])
    run(tmp_path, one, other)
    assert "no difference to tell" not in capsys.readouterr().out
    (other / "tiny").rename(other / "another")
    run(tmp_path, one, other)
    assert "no two of one, other have answered the same benchmark" in capsys.readouterr().out


def test_mistakes(answered, tmp_path: Path, capsys) -> None:
    one, other = answered("one", []), answered("other", [], limit=5)
    (tmp_path / "empty").mkdir()
    for models, message in (
        ([tmp_path / "empty"], "neither"),
        ([one, one], "two models are called 'one'"),
        ([one, other], "did not answer the same questions"),
    ):
        assert main(["compare", *map(str, models), "--output", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
