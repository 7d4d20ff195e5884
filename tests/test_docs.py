"""The guides' code is run as it stands on the page."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_samples

from mmkd.recipes.recipe import Recipe
from mmkd.registry import registry
from mmkd.runs.towers import build_student
from mmkd.testing import check_tower

PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def my_encoders(tmp_path, monkeypatch):
    """The page's first block as the file that it says it is, in the current folder; forgotten afterwards."""
    (tmp_path / "my_encoders.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("my_encoders", None)
    registry("encoders").remove("small_conv")


def test_the_example_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert lines[0] == "# my_encoders.py" and len(lines) <= 25


def test_the_page_runs_from_top_to_bottom(my_encoders, capsys):
    _, check, assemble, load = blocks("python")
    exec(compile(check, "check", "exec"), {})
    assert "'features of one picture': 64, 'width': 32" in capsys.readouterr().out
    made: dict = {}
    exec(compile(assemble, "assemble", "exec"), made)
    loaded: dict = {}
    exec(compile(load, "load", "exec"), loaded)
    for name, value in made["student"].model.state_dict().items():
        assert torch.equal(value, loaded["model"].state_dict()[name])
    assert loaded["processor"].chat_template == made["student"].processor.chat_template


def test_the_recipe_builds_a_student(my_encoders):
    (fragment,) = blocks("yaml")
    stage = {"data": [{"card": "any"}], "terms": {"cross_entropy": 1.0}, "steps": 1}
    recipe = Recipe.model_validate({"title": "t", "output": "o", "stages": {"sft": stage}, **yaml.safe_load(fragment)})
    student = build_student(recipe, None, ["what colour is it?", "red"])
    samples = tiny_samples(my_encoders / "pictures", 2)
    facts = check_tower(student, samples)
    assert facts["visual tokens"] == 2 * 64
