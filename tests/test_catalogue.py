"""The catalogue folders: every card and recipe loads, every README is current, the shipped towers are what they claim."""

from pathlib import Path

import pytest

from mmkd.base.cards import list_cards
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.recipes.reading import load_recipe, read_raw
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.runs.ablation import load_grid
from mmkd.testing.benchmark_tables import readme
from mmkd.towers.tower import Tower

ROOT = Path(__file__).resolve().parents[1]
EVERY = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
KIND = {path: read_raw(path).get("kind") for path in EVERY}
RECIPES = [path for path in EVERY if KIND[path] is None]
GRIDS = [path for path in EVERY if KIND[path] == "ablation"]
RANKING = [path for path in EVERY if path not in RECIPES + GRIDS]


def test_there_are_recipes_and_all_load():
    assert len(RECIPES) >= 10
    for path in RECIPES:
        recipe = load_recipe(path)
        assert recipe.title and recipe.output.startswith("runs/"), path
        assert "mmkd distill" in path.read_text(encoding="utf-8"), f"{path} does not say how it is run"


def test_there_are_grids_and_all_load():
    assert len(GRIDS) >= 2
    for path in GRIDS:
        grid, runs = load_grid(path, [])
        assert grid.title and all(run.recipe.output.startswith("runs/") for run in runs), path
        assert "mmkd distill" in path.read_text(encoding="utf-8"), f"{path} does not say how it is run"


def test_grids_and_rankings_are_read_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, runs = load_grid("ablation", [])
    assert {run.recipe.student.model for run in runs} == {str(ROOT / "models" / "sample-student")}
    assert load_ranking_recipe("cprd_sample").kind == "ranking"


def test_there_are_ranking_recipes_and_all_load():
    assert {load_ranking_recipe(path).kind for path in RANKING} == {"ranking", "matching"} and len(RANKING) >= 4
    for path in RANKING:
        assert "mmkd rank" in path.read_text(encoding="utf-8"), f"{path} does not say how it is run"


def test_every_benchmark_a_recipe_names_exists():
    names = {name for path in RECIPES for name in load_recipe(path).evaluation.benchmarks}
    assert names <= set(list_cards("evaluation"))
    assert {load_benchmark(name).name for name in names} == names


def test_the_benchmark_readme_is_current():
    assert (ROOT / "evaluation" / "README.md").read_text(encoding="utf-8") == readme()


@pytest.fixture(scope="module")
def shipped():
    return {name: Tower.load(ROOT / "models" / name, dtype="float32") for name in ("sample-teacher", "sample-student")}


def test_the_shipped_student_is_a_tenth_of_its_teacher(shipped):
    sizes = {name: tower.parameter_count()["total"] for name, tower in shipped.items()}
    assert sizes["sample-student"] <= sizes["sample-teacher"] / 10
    for name in shipped:
        assert (ROOT / "models" / name / "model.safetensors").stat().st_size <= 8_000_000


def test_the_shipped_towers_share_a_tokenizer(shipped):
    teacher, student = shipped["sample-teacher"], shipped["sample-student"]
    assert teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert teacher.processor_fingerprint() == student.processor_fingerprint()
