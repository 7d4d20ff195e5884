"""`teacher.keep`: the teacher reads each sample once, and the student learns the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_picture, tiny_tower

from mmkd.errors import RecipeError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.kept import keeps
from mmkd.runs.run import distill


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    teacher = tiny_tower(5, 64)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    rows = []
    for n in range(6):
        tiny_picture(root, f"{n}.png", n)
        rows += [{"image": f"{n}.png", "question": f"what is {k}?", "answer": "red"} for k in range(2)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe_of(folder, output, teacher=(), **keys):
    entry = {"format": "jsonl", "root": str(folder), "prompt": "plain"}
    stage = {"data": [entry], "steps": 6, "optimiser": {"batch_size": 8}, "terms": {"cross_entropy": 1.0, "forward_kl": 1.0}}
    towers = {"teacher": {"model": str(folder / "teacher"), **dict(teacher)}, "student": {"model": str(folder / "student")}}
    guards = {"pixels_matter": False, "teacher_is_better": False}
    raw = {"title": "t", "output": str(output), **towers, "stages": {"only": stage}, "guards": guards, "controls": [], **keys}
    return validate(raw, "test", Recipe)


def test_the_student_learns_the_same_and_nothing_is_read_twice(folder, tmp_path):
    distill(recipe_of(folder, tmp_path / "live"))
    distill(recipe_of(folder, tmp_path / "kept", {"keep": True}))
    live, kept = (load_file(tmp_path / name / "student/model.safetensors") for name in ("live", "kept"))
    assert all(torch.allclose(live[name], kept[name], atol=1e-4) for name in live)
    (cache,) = (tmp_path / "kept").parent.glob("kept/*/cache.json")
    shards = {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*.safetensors")}
    assert shards
    distill(recipe_of(folder, tmp_path / "second", {"keep": True}, seed=1))
    assert shards == {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*.safetensors")}


def test_equal_compute_counts_what_is_computed_once(folder, tmp_path):
    both = {"controls": ["equal_compute"]}
    distill(recipe_of(folder, tmp_path / "a" / "live", **both))
    distill(recipe_of(folder, tmp_path / "b" / "kept", {"keep": True}, **both))
    live, kept = (
        json.loads((tmp_path / name / "controls.json").read_text())["control_equal_compute"] for name in ("a/live", "b/kept")
    )
    counted = kept["operations"]
    assert counted["student"]["only"] + counted["once"]["only"] == live["operations"]["student"]["only"]
    ratio = (counted["student"]["only"] + counted["once"]["only"] * 12 / 48) / counted["control"]["only"]
    assert kept["steps"] == {"only": f"{-int(-6 * ratio // 1)} steps"}
    assert int(kept["steps"]["only"].split()[0]) < int(live["steps"]["only"].split()[0])


@pytest.mark.parametrize("other", [{"ahead": True}, {"kind": "live"}])
def test_keys_that_contradict_are_refused(folder, tmp_path, other):
    with pytest.raises(RecipeError, match=f"`{next(iter(other))}` has no place"):
        recipe_of(folder, tmp_path, {"keep": True, **other})


def test_several_processes_keep_nothing_and_are_told(folder, tmp_path, monkeypatch, caplog):
    recipe = recipe_of(folder, tmp_path, {"keep": True})
    assert keeps(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not keeps(recipe) and "run `mmkd cache RECIPE" in caplog.text
    assert not keeps(recipe_of(folder, tmp_path))


def test_where_nothing_is_compared_nothing_is_kept(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path, {"keep": True})
    stage = recipe.stages["only"].model_copy(update={"terms": {"cross_entropy": recipe.stages["only"].terms["cross_entropy"]}})
    assert not keeps(recipe.model_copy(update={"stages": {"only": stage}}))
