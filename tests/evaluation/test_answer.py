from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.store import PARTIAL
from mmkd.towers.one_sample import preparing


@pytest.fixture
def ask(data: Path, tmp_path: Path):
    """evaluate() on the small set, quietly, four questions a batch."""

    def run(tower, benchmark, out: str = "out", **options) -> dict:
        options = {"data_root": data, "batch_size": 4, "progress": False} | options
        return evaluate(tower, benchmark, tmp_path / out, **options)

    return run


def test_scores_and_what_is_reported(ask, benchmark_of, fake_tower, tmp_path: Path) -> None:
    tower = fake_tower({"red-1": "wrong", "red-2": "wrong", "text-0": "8"})
    result = ask(tower, benchmark_of(), model_name="models/fake")
    assert result == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert result["score"] == pytest.approx(29 / 32)
    assert result["ci95"][0] < result["score"] < result["ci95"][1]
    assert result["by"]["kind"]["red"]["score"] == pytest.approx(0.8)
    assert result["by"]["modality"]["text"]["n"] == 2
    expected = {
        "benchmark": "tiny", "model": "models/fake", "model_fingerprint": "fake", "metric": "exact_match",
        "n": 32, "n_skipped": 0, "skipped": {}, "unparsed_share": 0.0, "rows": 32, "split": "test",
        "prompt_style": "plain", "parser": "identity", "ocr_tokens": False, "max_new_tokens": 16,
        "prompt": "How much red is there?",
        "parameters": {"total": 1234, "active": 1000}, "rows_difference": None, "blind": False,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert result["versions"]["torch"] and result["seconds"] >= 0

    rows = list(read_predictions(tmp_path / "out" / "predictions.jsonl").values())
    assert [row["id"] for row in rows][:4] == ["red-0", "green-0", "blue-0", "red-1"]  # the order of the data
    assert rows[3]["prediction"] == "wrong" and rows[3]["score"] == 0.0 and rows[3]["references"] == ["1"]
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_questions_on_one_picture_share_its_visual_tokens(ask, benchmark_of, fake_tower) -> None:
    tower = fake_tower()
    ask(tower, benchmark_of())
    assert tower.largest_cache <= 3  # of 10: pictures that are done are dropped
    lengths = [
        max(int(name.split("-")[1]) for name in batch if not name.startswith("text"))
        for batch in tower.batches[:-1]
    ]
    assert lengths == sorted(lengths, reverse=True)  # long prompts first


@pytest.mark.parametrize("killed_at", [0, 1, 5])
@pytest.mark.parametrize("torn", [False, True])
def test_resume_gives_what_one_go_gives(
    ask, benchmark_of, fake_tower, tmp_path: Path, killed_at: int, torn: bool
) -> None:
    answers = {"blue-3": "näh\u2028\ud83d", "red-1": ""}
    whole = fake_tower(answers)
    ask(whole, benchmark_of(), "whole")
    with pytest.raises(KeyboardInterrupt):
        ask(fake_tower(answers, fail_at=killed_at), benchmark_of(), "killed")
    partial = tmp_path / "killed" / PARTIAL
    if torn:  # the machine went down while a line was written
        partial.write_bytes(partial.read_bytes()[:-7])
    second = fake_tower(answers)
    ask(second, benchmark_of(), "killed")
    kept = 0 if torn and killed_at == 0 else killed_at - (1 if torn else 0)
    assert second.batches == whole.batches[kept:]
    names = ("killed", "whole")
    killed, uninterrupted = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in names)
    assert killed == uninterrupted


def test_a_finished_evaluation_is_only_scored_again(ask, benchmark_of, fake_tower) -> None:
    first = ask(fake_tower({"red-1": "1."}), benchmark_of())
    second_tower = fake_tower()
    second = ask(second_tower, benchmark_of(metric="stvqa_accuracy"))
    assert second_tower.batches == []
    assert (first["score"], second["score"]) == (31 / 32, 1.0)
    assert second["seconds"] == pytest.approx(first["seconds"], abs=0.01)
    third_tower = fake_tower()
    ask(third_tower, benchmark_of(), resume=False)
    assert len(third_tower.batches) == 8


def test_another_model_replaces_a_finished_evaluation(ask, benchmark_of, fake_tower) -> None:
    ask(fake_tower({"red-1": "wrong"}), benchmark_of())
    assert ask(fake_tower(name="other"), benchmark_of())["score"] == 1.0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"name": "other"}, "model_fingerprint: 'fake' there, 'other' now"),
        ({"max_new_tokens": 3}, {}, "max_new_tokens: 16 there, 3 now"),
        ({"prompt_style": "short"}, {}, "data_fingerprint"),
    ],
)
def test_a_foreign_partial_file_is_refused(
    ask, benchmark_of, fake_tower, changes: dict, options: dict, message: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(fake_tower(fail_at=2), benchmark_of())
    with pytest.raises(DataError, match=message):
        ask(fake_tower(**options), benchmark_of(**changes))
    assert ask(fake_tower(**options), benchmark_of(**changes), resume=False)["score"] == 1.0


def test_a_damaged_partial_file_is_named(ask, benchmark_of, fake_tower, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PARTIAL).write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(DataError, match="is damaged"):
        ask(fake_tower(), benchmark_of())


def test_unreadable_pictures_are_skipped_and_counted(
    ask, benchmark_of, fake_tower, data: Path, tmp_path: Path
) -> None:
    (data / "tiny" / "images" / "3.png").write_bytes(b"no picture")
    (data / "tiny" / "images" / "4.png").unlink()
    result = ask(fake_tower(), benchmark_of())
    assert (result["n"], result["n_skipped"], result["score"]) == (26, 6, 1.0)
    assert result["skipped"] == {"image does not decode": 3, "image cannot be read": 3}
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert "3.png does not decode" in rows["green-3"]["skipped"]
    assert rows["green-3"]["score"] is None and rows["green-3"]["prediction"] is None
    assert rows["green-5"]["skipped"] is None


def test_what_a_processor_refuses_is_skipped_and_counted(ask, benchmark_of, fake_tower, tmp_path: Path) -> None:
    tower = fake_tower()
    answer = tower.answer

    def picky(samples, **options):
        for sample in samples:
            if sample.id in ("green-3", "red-5"):
                with preparing(sample):
                    raise IndexError(f"list index {len(sample.id)} out of range")
        return answer(samples, **options)

    tower.answer = picky
    result = ask(tower, benchmark_of())
    assert (result["n_skipped"], result["score"]) == (2, 1.0)
    assert result["skipped"] == {"sample cannot be prepared: IndexError: list index N out of range": 2}
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert "sample 'red-5' cannot be prepared" in rows["red-5"]["skipped"] and rows["red-4"]["skipped"] is None


def test_nothing_answered_is_an_error(ask, benchmark_of, fake_tower, data: Path) -> None:
    for path in (data / "tiny" / "images").glob("*.png"):
        path.unlink()
    lines = (data / "tiny" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "tiny" / "test.jsonl").write_text("\n".join(lines[:30]), encoding="utf-8")
    with pytest.raises(DataError, match="no question could be answered"):
        ask(fake_tower(), benchmark_of())


def test_blind_takes_the_pictures_away(ask, benchmark_of, fake_tower, tmp_path: Path) -> None:
    tower = fake_tower()
    result = ask(tower, benchmark_of(), blind=True)
    assert result["blind"] and set(tower.pictures) == {0}
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert rows["red-1"]["categories"]["modality"] == "image"
    assert rows["red-1"]["group"] == rows["blue-1"]["group"]  # still one picture's questions


def test_pictures_are_grouped_by_content(ask, benchmark_of, fake_tower, data: Path, tmp_path: Path) -> None:
    first = (data / "tiny" / "images" / "0.png").read_bytes()
    (data / "tiny" / "images" / "1.png").write_bytes(first)
    ask(fake_tower(), benchmark_of())
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert rows["red-0"]["group"] == rows["red-1"]["group"] != rows["red-2"]["group"]
    assert rows["text-0"]["group"] != rows["text-1"]["group"]


def test_other_data_has_another_fingerprint(ask, benchmark_of, fake_tower, data: Path) -> None:
    first = ask(fake_tower(), benchmark_of(), "a")
    assert ask(fake_tower(name="x"), benchmark_of(), "b")["data_fingerprint"] == first["data_fingerprint"]
    (data / "tiny" / "images" / "2.png").write_bytes((data / "tiny" / "images" / "3.png").read_bytes())
    assert ask(fake_tower(), benchmark_of(), "c")["data_fingerprint"] != first["data_fingerprint"]


def test_a_difference_in_rows_is_reported(ask, benchmark_of, fake_tower) -> None:
    assert (
        "32 rows, the card expects 40" in ask(fake_tower(), benchmark_of(expected_rows=40))["rows_difference"]
    )
    result = ask(fake_tower(), benchmark_of(expected_rows=32), "limited", limit=5)
    assert result["n"] == 5 and "limit=5" in result["rows_difference"]


def test_further_metrics(ask, benchmark_of, fake_tower) -> None:
    result = ask(fake_tower({"red-1": "12"}), benchmark_of(also=["anls"]))
    assert result["score"] == 31 / 32
    assert result["also"]["anls"]["score"] == pytest.approx(31.5 / 32)


def test_a_tower_that_loses_an_answer_is_an_error(ask, benchmark_of, fake_tower) -> None:
    tower = fake_tower()
    tower.answer = lambda samples, **options: ["x"]
    with pytest.raises(RuntimeError, match="1 answers to 4 questions"):
        ask(tower, benchmark_of())


# ---- particular benchmarks
# -------------------------------------------------------------------------------------


@pytest.fixture
def science(tmp_path: Path, data: Path) -> Path:
    """Three ScienceQA questions in the official files, one with a picture."""
    root = tmp_path / "scienceqa"
    (root / "images" / "test" / "1").mkdir(parents=True)
    picture = (data / "tiny" / "images" / "0.png").read_bytes()
    (root / "images" / "test" / "1" / "image.png").write_bytes(picture)
    problems = {}
    for pid, (answer, grade) in {"1": (0, 2), "2": (1, 6), "3": (2, 7)}.items():
        problems[pid] = {
            "question": f"Which of these, {pid}?",
            "choices": ["air", "fire", "earth"],
            "answer": answer,
            "hint": "",
            "image": "image.png" if pid == "1" else None,
            "grade": f"grade{grade}",
            "subject": "natural science",
            "split": "test",
        }
    (root / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (root / "pid_splits.json").write_text(json.dumps({"test": list(problems)}), encoding="utf-8")
    return root


def test_scienceqa_strict_is_the_headline(ask, fake_tower, science: Path, tmp_path: Path) -> None:
    from mmkd.evaluation.benchmarks import load_benchmark

    tower = fake_tower({"1": "A", "2": "(B) fire", "3": "It is hard to say."})
    result = ask(tower, load_benchmark("scienceqa"), data_root=science)
    assert result["score"] == pytest.approx(1 / 3)
    assert result["score_lenient"] == pytest.approx(2 / 3)
    assert result["unparsed_share"] == pytest.approx(2 / 3)
    assert result["by"]["modality"]["image"]["score"] == 1.0
    assert result["by"]["grades"] == {
        "1-6": result["by"]["grades"]["1-6"],
        "7-12": result["by"]["grades"]["7-12"],
    }
    assert result["scienceqa"]["grades 1-6"] == {"n": 2, "score": 0.5, "unparsed_share": 0.5}
    row = read_predictions(tmp_path / "out" / "predictions.jsonl")["2"]
    assert (row["parsed"], row["parsed_lenient"], row["references"]) == (None, "B", ["B"])
    assert (row["score"], row["score_strict"], row["score_lenient"]) == (0.0, 0.0, 1.0)
    assert row["choices"] == ["air", "fire", "earth"]


def test_pope_and_mme_numbers(ask, benchmark_of, fake_tower, data: Path) -> None:
    rows = [
        {
            "id": f"{i}",
            "image": f"{i // 2}.png",
            "question": "Is it?",
            "answer": answer,
            "categories": {"task": "color"},
        }
        for i, answer in enumerate(["yes", "no", "yes", "no"])
    ]
    (data / "tiny" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tower = fake_tower({"0": "Yes", "1": "No.", "2": "yes", "3": "yes"})
    pope = ask(tower, benchmark_of(parser="pope", metric="pope", categories=[]), "pope")
    assert pope["score"] == 0.75 and pope["pope"]["recall"] == 1.0 and pope["pope"]["yes_ratio"] == 0.75
    mme = ask(tower, benchmark_of(parser="mme", metric="mme", categories=[]), "mme")
    assert mme["mme"]["color"] == {"acc": 0.75, "acc_plus": 0.5, "score": 125.0}
