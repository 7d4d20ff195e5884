"""The guide to write stages is run as it stands on the page, on a small sample."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from mmkd.cli import main
from mmkd.registry import registry
from mmkd.writing.card import PromptCard
from mmkd.writing.checks import CheckSpec

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_recipe_writes_and_its_student_learns(tmp_path, monkeypatch, capsys):
    text, _ = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "runs/sample", "--sizes", "train=12,val=2,test=4"]) == 0
    content = yaml.safe_load(text)
    for role in ("teacher", "student"):
        content[role]["model"] = str(ROOT / content[role]["model"])
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    changes = ["stages.learn.steps=2", "stages.learn.optimiser.batch_size=8", "evaluation.limit=4", "guards.samples=4"]
    assert main(["distill", "recipe.yaml", "--dry-run", *changes]) == 0
    assert "stage words writes: teacher answer" in capsys.readouterr().out and not Path("runs/written").exists()
    assert main(["write", "recipe.yaml", *changes]) == 0
    told = r"words: runs/written/words-\w{16}\n  \d+ answers to \d+ prompts, \d+ kept\n  dropped by"
    assert re.search(told, capsys.readouterr().out)
    written = sorted(Path("runs/written/answers").rglob("*.jsonl"))
    assert main(["distill", "recipe.yaml", *changes]) == 0
    assert sorted(Path("runs/written/answers").rglob("*.jsonl")) == written  # nothing was asked again
    (words,) = Path("runs/written").glob("words-*")
    assert {path.name for path in words.iterdir()} == {"train.jsonl", "images", "dropped.jsonl", "facts.json", "README.md"}
    rows = [json.loads(line) for line in (words / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["provenance"]["notes"].keys() == {"votes", "odds"} for row in rows)
    assert (Path("runs/written_sample") / "summary.json").is_file()


def test_the_card_is_one():
    _, card = blocks("yaml")
    assert PromptCard.model_validate(yaml.safe_load(card)).form.made().keys() == ("question", "answer", "kind")


def test_the_page_names_every_check_and_form():
    for name in registry("checks").names():
        assert f"| `{name}` |" in PAGE, name
    assert all(f"`{name}`" in PAGE for name in registry("forms").names())


@pytest.fixture
def polite():
    yield
    registry("checks").remove("polite")


def test_the_check_of_ones_own_works(polite, tmp_path, monkeypatch):
    (code,) = blocks("python")
    (tmp_path / "my_polite_check.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("my_polite_check")
    assert CheckSpec(kind="polite", word="yes").made().word == "yes"
