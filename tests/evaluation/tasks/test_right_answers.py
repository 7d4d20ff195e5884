"""A model that is always right has a score of 1.0 on every layout: 2 to 26 choices, in English and Chinese, with and without
thinking, however it writes the letter."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase

import pytest
from layouts import encoded, picture

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.results import read_predictions

COUNTS = (2, 5, 6, 10, 26)  # choices of the questions that are written; the last one is right


def _words(count: int) -> list[str]:
    return ["None", "nan", "NA", *(f"thing {n}" for n in range(26))][:count]


def write_scienceqa(root: Path) -> None:
    problems = {
        str(count): {"question": "Which?", "choices": _words(count), "answer": count - 1, "split": "test", "image": None}
        for count in COUNTS
    }
    problems[str(COUNTS[0])]["image"] = "image.png"
    picture(root / "images" / "test" / str(COUNTS[0]) / "image.png")
    (root / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (root / "pid_splits.json").write_text(json.dumps({"test": list(problems)}), encoding="utf-8")


def write_aokvqa(root: Path) -> None:
    row = {"image_id": 42, "question": "Which?"}
    rows = [row | {"question_id": str(c), "choices": _words(c), "correct_choice_idx": c - 1} for c in COUNTS]
    (root / "aokvqa_v1p0_val.json").write_text(json.dumps(rows), encoding="utf-8")
    picture(root / "val2017" / "000000000042.jpg")


def write_ai2d(root: Path) -> None:
    questions = {
        f"Which of {count}?": {"questionId": str(count), "answerTexts": _words(count), "correctAnswer": count - 1}
        for count in COUNTS
    }
    (root / "ai2d" / "questions").mkdir(parents=True)
    (root / "ai2d" / "questions" / "3.png.json").write_text(json.dumps({"questions": questions}), encoding="utf-8")
    (root / "ai2d_test_ids.csv").write_text("3\n", encoding="utf-8")
    picture(root / "ai2d" / "images" / "3.png")


def write_seed(root: Path) -> None:
    rows = [
        {f"choice_{letter}": word for letter, word in zip(ascii_uppercase.lower(), _words(count), strict=False)}
        | {"question_id": str(count), "question": "Which?", "answer": ascii_uppercase[count - 1], "data_id": "4.jpg"}
        | {"data_type": "image"}
        for count in COUNTS
    ]
    (root / "SEED-Bench.json").write_text(json.dumps({"questions": rows}), encoding="utf-8")
    picture(root / "SEED-Bench-image" / "4.jpg")


def write_mmbench(root: Path, split: str) -> None:
    columns = ["index", "question", "hint", *ascii_uppercase, "answer", "image"]
    image = base64.b64encode(encoded(1)).decode()
    rows = [
        [str(count), "Which?", "", *_words(count), *[""] * (26 - count), ascii_uppercase[count - 1], image] for count in COUNTS
    ]
    with (root / f"mmbench_{split}.tsv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([columns, *rows])


def write_mmmu(root: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"id": str(count), "question": "Which is <image 1>?", "options": str(_words(count)), "question_type": "multiple-choice",
         "answer": ascii_uppercase[count - 1], "image_1": {"bytes": encoded(1), "path": "a.png"}}
        for count in COUNTS
    ]  # fmt: skip
    (root / "Art").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "Art" / "validation-0.parquet")


def write_math_vision(root: Path) -> None:
    row = {"question": "Which?", "image": "images/6.jpg", "level": 3, "subject": "logic"}
    rows = [row | {"id": str(c), "options": _words(c), "answer": ascii_uppercase[c - 1]} for c in COUNTS]
    (root / "testmini.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    picture(root / "images" / "6.jpg")


WRITERS: dict[str, Callable[[Path], None]] = {
    "scienceqa": write_scienceqa,
    "aokvqa": write_aokvqa,
    "ai2d": write_ai2d,
    "seed_image": write_seed,
    "mmbench_en": lambda root: write_mmbench(root, "dev_20230712"),
    "mmbench_cn": lambda root: write_mmbench(root, "dev_cn_20231003"),
    "mmmu": write_mmmu,
    "math_vision": write_math_vision,
}
THOUGHTS = ("{}", "<think>\nIt is A. 答案是A。\n</think>\n\n{}", "So (A)?[/THINK]{}", "<thinking>A</thinking> {}")
READ = ("{}", "({})", "{}.", "({}) thing", "The answer is {}.", "Answer: {}", "Option {}")
SMALL = ("{}", "({})", "{}.", "the answer is {}.")
CHINESE = ("答案是{}", "答案：{}", "选{}", "选择 {}", "（{}）", "故选{}。", "正确答案为（{}）", "{}选项", "選擇{}")


@pytest.fixture
def score(tmp_path: Path, fake_tower) -> Callable[[str, Callable[[str], str]], dict]:
    def run(card: str, say: Callable[[str], str]) -> dict:
        benchmark = load_benchmark(card)
        root = tmp_path / benchmark.root
        if not root.exists():
            root.mkdir()
            WRITERS[card](root)
        tower = fake_tower({str(count): say(ascii_uppercase[count - 1]) for count in COUNTS}, name=say("B"))
        found = evaluate(tower, benchmark, tmp_path / "out", data_root=tmp_path, progress=False, resume=False)
        assert found["n"] == len(COUNTS)
        return found

    return run


@pytest.mark.parametrize("card", WRITERS)
def test_the_letter_alone(card: str, score, tmp_path: Path) -> None:
    for thought in THOUGHTS:
        results = score(card, thought.format)
        assert results["score"] == 1.0, thought
        assert results["thinking_share"] == (thought != "{}")
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert "thing 22" in rows["26"]["prompt"] and "thing 23" not in rows["26"]["prompt"]
    assert ("Z. thing 22" in rows["26"]["prompt"]) != ("(Z) thing 22" in rows["26"]["prompt"])
    assert rows["2"]["choices"] == ["None", "nan"]


@pytest.mark.parametrize("card", ["aokvqa", "ai2d", "mmbench_en", "mmbench_cn"])
def test_a_letter_as_models_write_it(card: str, score) -> None:
    for form in READ:
        assert score(card, form.format)["score"] == 1.0, form
    for form in SMALL:
        assert score(card, lambda letter, form=form: form.format(letter.lower()))["score"] == 1.0, form


@pytest.mark.parametrize("card", ["scienceqa", "seed_image", "mmmu"])
def test_official_rules_stay_and_a_readers_stands_beside(card: str, score) -> None:
    for form in (*READ, *CHINESE):
        assert score(card, form.format)["score_lenient"] == 1.0, form
    assert score(card, str.lower)["score"] == 0.0
    assert score(card, str.lower)["score_lenient"] == 1.0


def test_chinese(score) -> None:
    full_width = {ord(letter): ord(letter) + 0xFEE0 for letter in ascii_uppercase}
    for form in CHINESE:
        for thought in THOUGHTS:
            assert score("mmbench_cn", lambda letter, f=form, t=thought: t.format(f.format(letter)))["score"] == 1.0, form
        assert score("mmbench_cn", lambda letter, f=form: f.format(letter.translate(full_width)))["score"] == 1.0, form


def test_the_servers_table_has_all_choices(score, tmp_path: Path, fake_tower) -> None:
    import zipfile

    score("mmbench_en", str)
    evaluate(
        fake_tower(), load_benchmark("mmbench_en"), tmp_path / "out", data_root=tmp_path, progress=False, submission=True,
        resume=False,
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / "out" / "submission.xlsx") as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert 'r="Z1"' in sheet and 'r="AB1" t="inlineStr"><is><t xml:space="preserve">Z<' in sheet and 'r="AE1"' not in sheet
