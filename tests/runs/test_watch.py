"""A student that is scored while it trains ends with the same bits as one that is not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_tower

from mmkd.errors import RecipeError
from mmkd.recipes.reading import load_recipe
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student
from mmkd.runs.watch import unchanged_randomness
from mmkd.sample.sample_set import write_sample_set

VISION = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 64, "patch_size": 16, "hidden_dropout_prob": 0.1,  # so that the random numbers matter
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_sample_set(tmp_path / "sample", sizes={"train": 8, "test": 2})
    tiny_tower(3, vision=VISION, image_size=(64, 64)).save(tmp_path / "student")
    content = {
        "title": "t", "output": str(tmp_path / "run"), "data_root": str(tmp_path / "sample"), "control": False,
        "student": {"model": str(tmp_path / "student")},
        "stages": {
            "sft": {"data": [{"card": "sample_textvqa"}], "terms": {"cross_entropy": 1.0}, "steps": 4, "log_every": 2,
                    "optimiser": {"batch_size": 4, "learning_rate": 1e-2}},
        },
        "evaluation": {"benchmarks": ["sample_textvqa"], "limit": 3},
        "guards": {"pixels_matter": False},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_scoring_in_training_changes_no_bit(recipe: Path, tmp_path: Path) -> None:
    for name, overrides in (("plain", []), ("watched", ["evaluation.every=2"])):
        found = load_recipe(recipe, overrides)
        train(found, "student", build_student(found, None, []), None, tmp_path / name)
    plain, watched = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("plain", "watched"))
    assert plain.keys() == watched.keys() and all(torch.equal(plain[key], watched[key]) for key in plain)
    rows = [json.loads(line) for line in (tmp_path / "watched" / "log" / "student.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["score sample_textvqa"] for row in rows if "score sample_textvqa" in row}
    assert list(scores) == [2, 4]
    for step, score in scores.items():
        folder = tmp_path / "watched" / "during" / "student" / "sft" / f"{step:06d}" / "sample_textvqa"
        assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["score"] == score


def test_randomness_is_put_back() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with unchanged_randomness():
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


def test_an_interval_needs_benchmarks(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="no benchmarks to ask"):
        load_recipe(recipe, ["evaluation.every=2", "evaluation.benchmarks=[]"])
