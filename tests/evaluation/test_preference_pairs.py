"""Pairs from two models' answers: right against wrong, on training questions only."""

from __future__ import annotations

import json

import pytest

from mmkd.data.formats import read_split
from mmkd.data.preference import rejected_of
from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.preference_pairs import write_pairs


@pytest.fixture
def answered(benchmark_of, data, fake_tower, tmp_path):
    """Evaluates a tower with these answers (else right) on the training split; returns its results folder."""
    (data / "tiny" / "train.jsonl").write_text((data / "tiny" / "test.jsonl").read_text())

    def run(name, answers, split="train"):
        benchmark = benchmark_of().on_split(split)
        evaluate(fake_tower(answers, name), benchmark, tmp_path / name / benchmark.name, data_root=data, progress=False)
        return tmp_path / name

    return run


def test_right_answers_are_chosen_and_wrong_ones_rejected(answered, data, tmp_path):
    teacher = answered("teacher", {"red-3": "wrong"})
    student = answered("student", {"red-1": " 9 ", "red-2": "", "red-3": "8", "text-0": "no"})
    control = answered("control", {"red-1": "9", "green-4": "many", "text-0": "none"})
    output = data / "preference" / "train.jsonl"
    counts = write_pairs(teacher, [student, control], output, data)
    assert counts == {"tiny_train": {"questions": 32, "right and wrong": 3, "pairs": 4}}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(r["id"], r["chosen"], r["rejected"]) for r in rows} == {
        ("tiny_train/red-1", "1", "9"), ("tiny_train/green-4", "4", "many"), ("tiny_train/text-0", "7", "no"),
        ("tiny_train/text-0/1", "7", "none"),
    }
    files = {"annotations": "preference/train.jsonl", "images": "."}
    samples = {s.id: s for s in read_split("preference", data, "train", files=files)}
    asked = samples["tiny_train/green-4"]
    assert asked.turns[0].text == "How much green really really really really is there?"
    assert asked.images[0].load().getpixel((0, 0)) == (80, 0, 0)
    assert samples["tiny_train/text-0"].images == () and rejected_of(asked).answer == "many"


def test_every_question_gets_a_pair_by_an_answer_given_on_another_picture(answered, data, tmp_path):
    path = data / "tiny" / "train.jsonl"
    path.write_text(path.read_text().replace(" really", ""))  # now one question each for red, green, blue and no picture
    true = {f"tiny_train/{row['id']}": row["answer"] for row in map(json.loads, path.read_text().splitlines())}
    teacher, student = answered("teacher", {"red-3": "many"}), answered("student", {"red-1": "11"})
    written = []
    for output in (tmp_path / "one.jsonl", tmp_path / "two.jsonl"):
        counts = write_pairs(teacher, [student], output, data, every_question=True)
        written.append(output.read_text())
    assert written[0] == written[1] and counts == {"tiny_train": {"questions": 32, "right and wrong": 1, "pairs": 29}}
    rows = {row["id"]: row for row in map(json.loads, written[0].splitlines())}
    # Not the teacher's error, and not where every picture has the same answer.
    assert rows.keys() == true.keys() - {"tiny_train/red-3", "tiny_train/text-0", "tiny_train/text-1"}
    assert all(row["chosen"] == true[name] != row["rejected"] for name, row in rows.items())
    assert rows["tiny_train/red-1"]["rejected"] == "11"
    digits = {str(n) for n in range(10)}
    assert {row["rejected"] for name, row in rows.items() if "red" not in name} <= digits
    assert {row["rejected"] for name, row in rows.items() if "red" in name} <= digits | {"many", "11"}
    assert len({row["rejected"] for row in rows.values()}) > 5


def test_answers_to_test_questions_are_refused(answered, data, tmp_path):
    teacher, student = answered("teacher", {}, "test"), answered("student", {"red-1": "9"}, "test")
    with pytest.raises(DataError, match="holds answers to split 'test', not 'train'"):
        write_pairs(teacher, [student], tmp_path / "pairs.jsonl", data)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_what_cannot_be_paired_is_named(answered, data, tmp_path):
    teacher, student = answered("teacher", {}), answered("student", {"red-1": "9"})
    output = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match=r"no question was answered rightly in .*student and wrongly in .*teacher"):
        write_pairs(student, [teacher], output, data)
    with pytest.raises(DataError, match=r"no benchmark with answers in all folders .*nobody: none"):
        write_pairs(teacher, [tmp_path / "nobody"], output, data)
    with pytest.raises(DataError, match=r"does not lie in .*; give the folder that holds all pictures"):
        write_pairs(teacher, [student], output, tmp_path / "student")
    assert not output.exists()
