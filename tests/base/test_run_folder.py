"""A run's folder belongs to one recipe."""

from __future__ import annotations

import json

import pytest
import yaml

from mmkd.base.run_folder import claim, differences
from mmkd.errors import DataError

RECIPE = {"seed": 1, "stages": {"sft": {"steps": 3, "terms": ["a", "b"]}}}


def begin(folder):
    (folder / "log").mkdir()
    (folder / "log" / "student.jsonl").write_text("{}\n")


def test_the_same_recipe_goes_on_and_another_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        claim(folder, RECIPE, title="a title", seed=1)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == RECIPE
    assert json.loads((folder / "run.json").read_text())["title"] == "a title"
    begin(folder)
    other = {"seed": 1, "stages": {"sft": {"steps": 4, "terms": ["a"], "epochs": 1}}}
    with pytest.raises(DataError, match=r"differs in stages.sft.epochs, stages.sft.steps, stages.sft.terms\)"):
        claim(folder, other, title="a title", seed=1)


def test_a_folder_in_which_nothing_was_trained_is_free_for_a_mended_recipe(tmp_path):
    claim(tmp_path, RECIPE, title="a title", seed=1)
    claim(tmp_path, {"seed": 2}, title="a title", seed=2)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"seed": 2}


def test_a_run_of_other_data_is_refused_with_the_file(tmp_path):
    data = {"sft": {"0": {"train.jsonl": "aa", "more.jsonl": "bb"}}}
    claim(tmp_path, RECIPE, title="a title", seed=1, data=data)
    begin(tmp_path)
    claim(tmp_path, RECIPE, title="a title", seed=1, data=data)
    changed = {"sft": {"0": {"train.jsonl": "cc", "more.jsonl": "bb"}}}
    with pytest.raises(DataError, match=r"run of other data \(differs in sft.0.train.jsonl\)"):
        claim(tmp_path, RECIPE, title="a title", seed=1, data=changed)


def test_a_run_of_before_that_recorded_no_data_goes_on(tmp_path):
    claim(tmp_path, RECIPE, title="a title", seed=1)
    begin(tmp_path)
    claim(tmp_path, RECIPE, title="a title", seed=1, data={"sft": {"0": {"train.jsonl": "aa"}}})


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path / "one", RECIPE, title="a title", seed=1)
    assert not (tmp_path / "one").exists()


def test_differences():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) == []
    assert sorted(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2, "d": 3}})) == ["a.b", "a.d", "c"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a"]
