"""The model card of a student, from the records of a run's folder."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from mmkd.errors import DataError
from mmkd.evaluation.model_card import MARKER, escaped, write_model_card

HOSTILE = "<script>alert(1)</script> | [x](http://evil.example) ![y](z) `code` **bold** \n# head @user $a$ &lt;\u202e"
LEAD = {"mean": 0.25, "ci95": [0.125, 0.375], "nll": {"mean": -1, "ci95": [-2, 0], "n": 8,
        "after_temperature": {"mean": -0.5, "ci95": [-0.75, -0.25]}}, "name": "equal_compute"}  # fmt: skip
ENTRY = {
    "n": 1234, "teacher": 0.875, "teacher_ci95": [0.8, 0.9], "control": 0.375, "control_ci95": [0.3, 0.4],
    "control_equal_compute": 0.5, "control_equal_compute_ci95": [0.44, 0.56],
    "hard_answers": 0.8, "hard_answers_ci95": [0.7, 0.85],
    "student": 0.75, "student_ci95": [0.7, 0.8], "student_minus_best_control": LEAD,
    "student_minus_hard_answers": {"mean": -0.05, "ci95": [-0.11, 0.01]},
    "student_minus_teacher": {"mean": -0.125, "ci95": [-0.2, -0.0625]},
    "parameters": {"teacher": 7_000_000, "control": 1000, "control_equal_compute": 1000, "hard_answers": 1000, "student": 1000},
    "student_blind": 0.3125, "remarks": {"student": ["one answer makes 95 % of 1234: '| yes'"]},
}  # fmt: skip
SUMMARY = {
    "title": "a run", "seed": 7, "seconds": 600.0, "benchmarks": {"shapes": ENTRY}, "ended": "2026-03-04",
    "samples": {"sft": [4321]},
    "hub": {"teacher": ["big/teacher-7b"], "student": ["org/student-1b"]}, "rows_left_out": {"sft": {"without a picture": 3}},
    "skipped": {"student": {"sft": {"longer than max_length": 2}}},
}  # fmt: skip
RECIPE = {
    "max_length": 512, "guards": {"pixels_matter": True, "teacher_is_better": False},
    "teacher": {"model": "big/teacher-7b", "quantise": "4bit"},
    "student": {"model": "org/student-1b", "dtype": "float32"},
    "stages": {"sft": {"steps": 1200, "precision": "bfloat16", "data": [{"card": "scenes", "target": "teacher"}],
               "terms": {"kl": {"kind": "forward_kl", "weight": 4.0}}, "optimiser": {"learning_rate": 0.002, "batch_size": 32}}},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run", SUMMARY, RECIPE)


def run_of(folder: Path, summary: dict, recipe: dict) -> Path:
    answers = folder / "evaluation" / "student" / "shapes"
    answers.mkdir(parents=True, exist_ok=True)
    (folder / "student").mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    begun = {"title": "a run", "date": "2026-03-02", "command": "mmkd distill /home/me/x.yaml"}
    (folder / "run.json").write_text(json.dumps(begun), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    results = {"versions": {"torch": "2.99.1"}, "efficiency": {"dtype": "float32"}}
    (answers / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def card(folder: Path) -> str:
    return write_model_card(folder).read_text(encoding="utf-8")


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_numbers_are_those_of_the_summary(run):
    text = card(run)
    for row in (
        "| teacher | 87.5 % | 80.0 % to 90.0 % | 7,000,000 |",
        "| control (equal compute) | 50.0 % | 44.0 % to 56.0 % | 1,000 |",
        "| control | 37.5 % | 30.0 % to 40.0 % | 1,000 |",
        "| hard answers | 80.0 % | 70.0 % to 85.0 % | 1,000 |",
        "| student | 75.0 % | 70.0 % to 80.0 % | 1,000 |",
        "| student without pictures | 31.2 % | not computed |  |",
        "| student − best control (equal compute) | +25.0 | +12.5 to +37.5 | the student is ahead |",
        "| student − best control (equal compute), negative log-likelihood (no points) | −0.500 | −0.750 to −0.250 | better |",
        "| student − hard answers | −5.0 | −11.0 to +1.0 | no difference shown |",
        "| student − teacher | −12.5 | −20.0 to −6.2 | the student is behind |",
        "| scenes | 4,321 | split train, the teacher's answers |",
        "| seed | 7 |", "| begun | 2026-03-02 |", "| ended | 2026-03-04 |", "| versions | torch 2.99.1 |",
    ):  # fmt: skip
        assert row in text.splitlines(), row
    assert "1234 questions" in text and "Length: 1200 steps" in text and "forward\\_kl (kl) × 4" in text
    assert "3 without a picture" in text and "2 longer than max\\_length" in text and "Precision: bfloat16" in text
    assert "training on: a run stops where other pictures" in text
    assert "training off: a run stops where the teacher" in text
    assert "big/teacher-7b, weights in 4bit" in text
    assert "Intervals are over pictures" in text and "one training seed here (7)" in text


def test_a_stage_that_kept_an_earlier_student_says_which(tmp_path):
    watched = {"sft": {"steps": 900, "kept": 600}}
    kept = card(run_of(tmp_path / "a", SUMMARY | {"monitor": watched}, RECIPE))
    assert "900 steps, step 600 kept, the best on held-out prompts" in kept
    watched["sft"]["kept"] = None  # it was watched alone
    assert "Length: 1200 steps" in card(run_of(tmp_path / "b", SUMMARY | {"monitor": watched}, RECIPE))


def test_the_front_matter_is_what_the_hub_reads(run, tmp_path):
    found = front_matter(card(run))
    assert found["pipeline_tag"] == "image-text-to-text" and found["library_name"] == "transformers"
    assert found["base_model"] == "org/student-1b" and "mmkd" in found["tags"] and "license" not in found
    local = {key: value for key, value in SUMMARY.items() if key != "hub"}
    assert "base_model" not in front_matter(card(run_of(tmp_path / "local", local, RECIPE)))


def test_names_with_markup_are_shown_as_they_stand(tmp_path):
    summary, recipe = copy.deepcopy(SUMMARY), copy.deepcopy(RECIPE)
    summary["title"] = HOSTILE
    summary["benchmarks"] = {HOSTILE: summary["benchmarks"]["shapes"] | {"remarks": {"student": [HOSTILE]}}}
    summary["rows_left_out"] = {"sft": {HOSTILE: 1}}
    summary["hub"] = {"student": ["a\nlicense: mit"], "teacher": [HOSTILE]}
    recipe["teacher"]["model"] = HOSTILE
    recipe["stages"]["sft"]["data"][0]["card"] = HOSTILE
    recipe["stages"]["sft"]["terms"] = {HOSTILE: 1.0}
    text = card(run_of(tmp_path / "run", summary, recipe))
    assert not re.search(r"(?<!\\)<(?!!-- mmkd)", text) and not re.search(r"(?<!\\)\]\(", text) and "\u202e" not in text
    assert not re.search(r"(?<!\\)`code", text) and "**" not in text and "http://" not in text and "\n# head" not in text
    assert not re.search(r"(?<!\\)[$@]", text) and set(front_matter(text)) == {"library_name", "pipeline_tag", "tags"}
    (row,) = [line for line in text.splitlines() if line.endswith("| 4,321 | split train, the teacher's answers |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


@pytest.mark.parametrize("where", ["/home/me/models/base", "~/models/base", "../models/base/", "C:\\Users\\me\\base"])
def test_folders_of_the_machine_are_not_named(tmp_path, where):
    recipe = copy.deepcopy(RECIPE) | {"student": {"model": where}, "teacher": {"model": where, "cache": "/home/me/cache"}}
    recipe["stages"]["sft"]["data"] = [{"format": "jsonl", "root": "/home/me/mine"}]
    summary = SUMMARY | {"hub": {}, "rows_left_out": {"sft": {"no picture at '/home/me/mine/a.png'": 1}}}
    text = card(run_of(tmp_path / "run", summary, recipe))
    assert "starting from base." in text and "| mine (jsonl) |" in text and "no picture at 'a.png'" in text
    assert not re.search(r"/home|Users|models|\.\./", text)


def test_a_readme_of_somebody_else_is_kept(run, caplog):
    for own in ("# Mine\n", "quoted: " + MARKER + "\n"):
        (run / "student" / "README.md").write_text(own)
        assert write_model_card(run) is None
        assert (run / "student" / "README.md").read_text() == own and "it is kept" in caplog.text
    (run / "student" / "README.md").unlink()
    (run / "mine.md").write_text(MARKER)
    (run / "student" / "README.md").symlink_to(run / "mine.md")
    assert write_model_card(run) is None and (run / "mine.md").read_text() == MARKER


def test_the_same_records_leave_the_card_untouched_and_others_write_it_again(run):
    path = write_model_card(run)
    before, at = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    assert write_model_card(run) == path and path.stat().st_mtime_ns == at
    run_of(run, SUMMARY | {"seed": 8}, RECIPE)
    assert "| seed | 8 |" in card(run) and "| seed | 7 |" in before


def test_nothing_is_written_without_a_student_or_a_summary(run):
    (run / "summary.json").unlink()
    assert write_model_card(run) is None and not list((run / "student").iterdir())
    (run / "student").rmdir()
    assert write_model_card(run) is None


DAMAGED = [{"benchmarks": 3}, {"benchmarks": {"shapes": {"n": 1}}}, {"samples": 5}, {"hub": [1]}, {"seconds": "x"}]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_records_are_named(run, damage):
    run_of(run, SUMMARY | damage, RECIPE)
    with pytest.raises(DataError, match=r"records are not those of a run .*summary\.json"):
        write_model_card(run)
    assert not list((run / "student").iterdir())


def test_text_is_on_one_line():
    assert escaped("a\n\n- b\x00") == "a - b" and escaped("www.evil.com") == "www\\.evil.com"
