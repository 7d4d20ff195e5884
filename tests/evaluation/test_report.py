from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from html_page import Page

from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.report import build_report
from mmkd.evaluation.report.curves import charts, ticks
from mmkd.evaluation.report.files import roles_of

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def run(tmp_path: Path, data: Path, benchmark_of, fake_tower) -> Path:
    """A run of teacher, control and student on one benchmark, with curves."""
    root = tmp_path / "run"
    wrong = {
        "teacher": [],
        "student": ["red-1"],
        "control": [f"{k}-{i}" for k in ("red", "blue") for i in range(1, 10)],
    }
    for role, names in wrong.items():
        answers = {name: ATTACK for name in names} | ({"green-5": ATTACK} if role == "student" else {})
        out = root / "evaluation" / role / "tiny"
        evaluate(
            fake_tower(answers, role),
            benchmark_of(),
            out,
            data_root=data,
            progress=False,
            model_name=f"{role} <b>",
        )
    blind = root / "evaluation_blind" / "student" / "tiny" / "results.json"
    blind.parent.mkdir(parents=True)
    blind.write_text(json.dumps({"score": 0.5}), encoding="utf-8")
    (root / "log").mkdir()
    for role in ("student", "control"):
        lines = [
            {"stage": stage, "step": step, "loss": 3.0 - step / 50, "learning_rate": 1e-3}
            | ({"kl & more": 0.1 * step} if role == "student" else {})
            for stage in ("align", "distil")
            for step in range(0, 100, 5)
        ]
        lines[3]["loss"] = float("nan")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "log" / f"{role}.jsonl").write_text(text + '{"step": 9', encoding="utf-8")
    (root / "run.json").write_text(json.dumps({"title": "a <i>run</i>", "seed": 3}), encoding="utf-8")
    (root / "summary.json").write_text(
        json.dumps({"steps": 200, "benchmarks": {"tiny": {"n": 32}}, "device": {"name": "cpu"}}),
        encoding="utf-8",
    )
    return root


@pytest.mark.parametrize(
    ("errors_of_student", "said"), [(0, "show no difference"), (8, "the student is behind its control: -")]
)
def test_a_teacher_that_is_worth_nothing_gives_no_lead_and_the_first_line_says_so(
    tmp_path: Path, data: Path, benchmark_of, fake_tower, errors_of_student: int, said: str
) -> None:
    every = [f"{kind}-{i}" for kind in ("red", "green", "blue") for i in range(10)] + ["text-0", "text-1"]
    for role, wrong in {"teacher": every, "control": [], "student": every[:errors_of_student]}.items():
        tower, out = fake_tower(dict.fromkeys(wrong, "?"), role), tmp_path / "run" / "evaluation" / role / "tiny"
        evaluate(tower, benchmark_of(), out, data_root=data, progress=False)
    (first,) = re.findall(r"<h1[^>]*>(.*?)</h1>", build_report(tmp_path / "run").read_text(), re.DOTALL)
    assert said in first and "leads" not in first


def test_the_page_holds_what_a_reader_needs(run: Path) -> None:
    path = build_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    words = page.words()
    assert "On tiny the student leads its control: +" in words
    assert "a <i>run</i>" in words and "seed 3" in words and "steps 200" in words
    assert "device name cpu" in words and "without pictures: 50.0 %" in words
    assert "1.23 k" in words and "1 k active" in words
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert [chart["aria-label"].split(" over")[0] for chart in charts] == ["loss of student", "loss of control", "kl & more"]
    assert "distil" in words  # where the second stage begins
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert pictures and all(p["src"].startswith("data:image/") and p["alt"] for p in pictures)
    items = [attrs for tag, attrs in page.tags if tag == "article"]
    assert 24 <= len(items) <= 48
    for outcome in ("student better than its best control", "all fully right"):
        assert outcome in words


def test_a_loss_is_drawn_over_one_of_the_same_terms_alone(tmp_path: Path) -> None:
    rows = {
        "student": {"loss": 2.0, "cross_entropy": 1.0, "kl": 1.0, "score tiny": 0.5},
        "control": {"loss": 1.0, "cross_entropy": 1.0},
        "control_equal_compute": {"loss": 1.0, "cross_entropy": 1.0, "score tiny": 0.4},
    }
    for role, row in rows.items():
        lines = [json.dumps({"stage": "a", "step": step, **row}) for step in (1, 2, 3)]
        (tmp_path / f"{role}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    paths = {role: tmp_path / f"{role}.jsonl" for role in rows}
    drawn = {chart["name"]: [curve["role"] for curve in chart["curves"]] for chart in charts(paths)}
    assert drawn == {
        "loss of student": ["student"], "loss of control, control (equal compute)": ["control", "control_equal_compute"],
        "cross_entropy": ["student", "control", "control_equal_compute"], "kl": ["student"],
        "score tiny": ["student", "control_equal_compute"],
    }  # fmt: skip
    del paths["student"]
    assert charts(paths)[0]["name"] == "loss"


def test_what_each_teacher_brought_is_a_table(run: Path) -> None:
    assert "What each teacher brought" not in build_report(run).read_text(encoding="utf-8")
    own = {"weight": 0.7, "used": 0.5, "agreement": 0.601, "lead": 1.25}
    brought = {"distil": {"mix": {"a <b>": own, "b": {"weight": 0.3, "used": 0, "agreement": None, "lead": None}}}}
    (run / "summary.json").write_text(json.dumps({"steps": 200, "brought": brought}), encoding="utf-8")
    words = Page(build_report(run).read_text(encoding="utf-8")).words()
    assert "What each teacher brought" in words and "distil, mix" in words and "a <b>" in words
    assert "70.0 %" in words and "60.1 %" in words and "+1.25" in words


def test_proxy_and_golden_on_held_out_prompts_are_a_table(run: Path) -> None:
    assert "On held-out prompts" not in build_report(run).read_text(encoding="utf-8")
    at = {name: {"step": 10 * n, "proxy": 3.0 - n, "golden": 1.5} for n, name in enumerate(("first", "lowest", "last"))}
    facts = {"a <b>": {**at, "hacked": 20, "kept": 10}, "other": {**at, "hacked": None, "kept": None}, "broken": 3, "empty": {}}
    (run / "summary.json").write_text(json.dumps({"monitor": facts}), encoding="utf-8")
    words = Page(build_report(run).read_text(encoding="utf-8")).words()
    assert "On held-out prompts" in words and "a <b>: teacher hacking, seen at step 20; step 10 kept" in words
    assert "other: no teacher hacking seen" in words and "broken" not in words and "at the golden minimum" in words


def test_predictions_are_escaped_and_nothing_is_fetched(run: Path) -> None:
    text = build_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert ATTACK in page.words()
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert all(attrs.get("href", "#").startswith("#") for _, attrs in page.tags)


def test_the_same_files_give_the_same_page(run: Path) -> None:
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first


@pytest.mark.parametrize("left", [["student"], ["teacher"], ["student", "teacher"], ["student", "control"]])
def test_missing_models(run: Path, left: list[str]) -> None:
    for role in {"teacher", "control", "student"} - set(left):
        (run / "evaluation" / role).rename(run / f"gone-{role}")
    for path in ("log/control.jsonl", "log/student.jsonl", "run.json", "summary.json"):
        (run / path).unlink()
    words = Page(build_report(run).read_text(encoding="utf-8")).words()
    assert ("leads its control" in words) == (left == ["student", "control"])
    assert ("No control to compare with" in words) == ("control" not in left)


def test_several_benchmarks(run: Path) -> None:
    for role in ("teacher", "student"):
        other = run / "evaluation" / role / "other"
        other.mkdir()
        for name in ("results.json", "predictions.jsonl"):
            (other / name).write_bytes((run / "evaluation" / role / "tiny" / name).read_bytes())
    page = Page(build_report(run).read_text(encoding="utf-8"))
    radios = [attrs["id"] for tag, attrs in page.tags if tag == "input"]
    assert {"b-all", "b-1", "b-2", "o-all", "o-gain"} <= set(radios)
    assert "On tiny the student leads" in page.words()


def test_a_picture_that_is_gone_is_said_to_be(run: Path, data: Path) -> None:
    for path in (data / "tiny" / "images").glob("*.png"):
        path.unlink()
    assert "cannot be read any more" in build_report(run).read_text(encoding="utf-8")


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no evaluation"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.37, 0.41), (-3.0, 12.0), (2.0, 2.0), (0.0, 0.0), (1e-6, 3e-6)]
)
def test_ticks_are_few_and_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 7
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert found == sorted(set(found))


def test_answers_can_be_filtered_by_model_and_mark(run: Path) -> None:
    """The filters are style sheets: every radio button has a rule, and every answer the class that the rule names."""
    text = build_report(run).read_text(encoding="utf-8")
    page = Page(text)
    radios = {attrs["id"] for tag, attrs in page.tags if tag == "input"}
    assert {"m-student-all", "m-student-right", "m-student-wrong", "m-control-right", "m-control-wrong"} <= radios
    assert "m-teacher-right" not in radios  # all of the teacher's answers are right: there is nothing to choose
    for name in radios:
        assert name.endswith("-all") or f":has(#{name}:checked)" in text
    marks = [attrs["class"].split() for tag, attrs in page.tags if tag == "article"]
    wrong = sum("control-wrong" in classes for classes in marks)
    assert wrong > 0 and f"wrong ({wrong})" in page.words()
    assert all("teacher-right" in classes for classes in marks)


def test_efficiency_and_fidelity_are_shown(run: Path) -> None:
    words = Page(build_report(run).read_text(encoding="utf-8")).words()
    assert "4.94 KB" in words and "float32" in words and "questions/s" in words and "tokens/s" in words
    assert "right where the teacher is not: 0" in words
    path = run / "evaluation" / "student" / "tiny" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    shares = {"needs_image": 0.4, "both": 0.5, "hurt_by_image": 0.0, "neither": 0.1}
    path.write_text(json.dumps(results | {"importance": {"n": 30, **shares}}), encoding="utf-8")
    words = Page(build_report(run).read_text(encoding="utf-8")).words()
    assert "right only with the picture: 40.0 %" in words and "of 30 questions with a picture" in words


def test_several_teachers_stand_first_by_name(tmp_path: Path) -> None:
    for role in ("student", "second", "control", "first"):
        (tmp_path / "evaluation" / role).mkdir(parents=True)
    assert roles_of(tmp_path) == ["first", "second", "control", "student"]
    assert roles_of(tmp_path / "evaluation") == []
