"""`mmkd ask`: the same answer as `mmkd evaluate`, side by side, interactively, and what mistakes are told."""

from __future__ import annotations

import io
import json

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.runs.ask import sort_words
from mmkd.runs.evaluate import evaluate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_tower(seed).save(folder / name)
    (folder / "data").mkdir()
    rows = []
    for number in range(3):
        tiny_picture(folder / "data", f"{number}.png", number)
        rows.append({"image": f"{number}.png", "question": f"what is red {number}?", "answer": "red"})
    (folder / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = {"title": "t", "format": "jsonl", "root": str(folder / "data"), "split": "test", "prompt_style": "short",
            "metric": "exact_match", "max_new_tokens": 6}  # fmt: skip
    (folder / "own.yaml").write_text(json.dumps(card))
    return folder


def asked(capsys, *words: str) -> str:
    assert main(["ask", *words]) == 0
    return capsys.readouterr().out


def test_the_answer_is_that_of_an_evaluation(models, capsys, tmp_path):
    evaluate(str(models / "one"), [str(models / "own.yaml")], output=tmp_path, batch_size=1)
    rows = [json.loads(line) for line in (tmp_path / "own" / "predictions.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        picture, question = str(models / "data" / f"{number}.png"), f"what is red {number}?"
        words = asked(capsys, str(models / "one"), picture, question, "--like", str(models / "own.yaml"))
        assert words.rstrip("\n") == (row["prediction"] or "(an empty answer)")
        same = asked(capsys, str(models / "one"), picture, question, "--style", "short", "--max-new-tokens", "6")
        assert same == words


def test_several_models_answer_side_by_side(models, capsys):
    picture = str(models / "data" / "0.png")
    names = [str(models / name) for name in ("one", "two")]
    both = asked(capsys, *names, picture, "what?", "--max-new-tokens", "4")
    alone = [asked(capsys, name, picture, "what?", "--max-new-tokens", "4").strip() for name in names]
    assert all(answer.splitlines()[0] in both for answer in alone if answer)


def test_a_runs_folder_stands_for_its_models(models, capsys, tmp_path):
    (tmp_path / "student").symlink_to(models / "one")
    (tmp_path / "control").symlink_to(models / "two")
    (tmp_path / "recipe.yaml").write_text(f"teacher: {{model: {models / 'two'}}}\n")
    lines = asked(capsys, str(tmp_path), str(models / "data" / "0.png"), "what?", "--max-new-tokens", "2").splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == ["teacher", "control", "student"]


def test_questions_are_asked_for_and_pictures_change(models, capsys, monkeypatch):
    other = str(models / "data" / "1.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"what?\n{other}\nwhat?\nmissing.png\n\nnever asked\n"))
    out, error = asked(capsys, str(models / "one"), str(models / "data" / "0.png"), "--max-new-tokens", "3"), ""
    direct = asked(capsys, str(models / "one"), other, "what?", "--max-new-tokens", "3")
    assert direct.strip() in out and error == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "missing.png", "what?"], "there is no picture missing.png"),
        (["missing.png", "what?"], "no model stands before"),
        (["MODEL", "a.png", "what?", "and?"], "one question in quotes"),
        (["MODEL", "https://host/a.png", "what?"], "web address"),
        (["MODEL", "broken.png", "what?"], "does not decode"),
        (["no_such_model_folder/x", "what is it?"], "no_such_model_folder"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, models, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert main(["ask", *(str(models / "one") if word == "MODEL" else word for word in words)]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told


def test_words_are_sorted_by_what_they_are():
    assert sort_words(["a/b", "x.png", "y.JPG", "what?"])[1:][1] == "what?"
    assert sort_words(["m", "what is it?"]) == (["m"], [], "what is it?")
    assert sort_words(["m", "n"]) == (["m", "n"], [], None)
    with pytest.raises(DataError, match="then pictures"):
        sort_words(["m", "x.png", "what?", "y.png"])
