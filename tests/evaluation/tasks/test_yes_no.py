"""Yes or no: what a reader takes, and how many answers hold neither, beside the official numbers of POPE and MME."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.tasks.yes_no import neither_share, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        (" **No**, there is none", "no"),
        ("YES!", "yes"),
        ("Yes, though not in front", "yes"),
        ("I would say yes", "yes"),
        ("There is not", "no"),
        ("It isn't.", "no"),
        ("It isn’t.", "no"),
        ("I cannot see one", "no"),
        ("Is it a yes or a no?", None),
        ("A dog.", None),
        ("nobody knows", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_what_a_reader_takes(text: str, expected: str | None) -> None:
    assert yes_or_no(text) == expected


def test_share_of_answers_with_neither() -> None:
    texts = ["yes", "It is not", "maybe", "", "yes or no"]
    assert neither_share([{"prediction": text} for text in texts]) == 2 / 5
    assert neither_share([{"prediction": "<think>yes", "thinking": "unclosed", "answer": None}]) == 1.0


@pytest.mark.parametrize(
    ("name", "official", "lenient"),
    [("pope", 2 / 4, 3 / 4), ("mme", 1 / 4, 3 / 4)],  # POPE takes "A dog." and "NO" for yes, MME no sentence
)
def test_official_score_stays(
    name: str, official: float, lenient: float, data: Path, tmp_path: Path, benchmark_of, fake_tower
) -> None:
    truth = {"0": ("yes", "A dog."), "1": ("no", "NO"), "2": ("yes", "It is one, yes"), "3": ("no", "Surely NOT")}
    rows = [{"id": i, "image": f"{int(i) // 2}.png", "question": "Is it?", "answer": right} for i, (right, _) in truth.items()]
    (data / "tiny" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tower = fake_tower({i: said for i, (_, said) in truth.items()})
    card = benchmark_of(parser=name, metric=name, categories=[])
    found = evaluate(tower, card, tmp_path / "out", data_root=data, progress=False)
    assert (found["score"], found["score_lenient"], found["neither_share"]) == (official, lenient, 1 / 4)
    row = read_predictions(tmp_path / "out" / "predictions.jsonl")["3"]
    assert (row["score_strict"], row["parsed_lenient"], row["score_lenient"]) == (row["score"], "no", 1.0)
