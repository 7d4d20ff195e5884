"""The recipes of write stages: all load, each is in the table of methods, and the table is current."""

from pathlib import Path

from mmkd.base.cards import list_cards
from mmkd.base.yaml_files import read_mapping
from mmkd.recipes.reading import load_recipe
from mmkd.testing import method_tables
from mmkd.writing.card import load_prompt, readme

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "scripts" / "recipes" / "write").glob("*.yaml"))


def test_all_load_and_say_how_they_are_run():
    assert len(RECIPES) >= 12
    for path in RECIPES:
        recipe = load_recipe(path)
        assert recipe.writes and recipe.output == f"runs/write/{path.stem}", path
        assert f"mmkd distill scripts/recipes/write/{path.name}" in path.read_text(encoding="utf-8"), path


def test_each_stands_in_the_table_with_its_status():
    rows = read_mapping(method_tables.WRITING, "table")["systems"].values()
    named = {name for row in rows for name in row["recipes"]}
    assert named == {path.stem for path in RECIPES} - {"endpoint"}  # which is no method of a paper
    assert all(row["status"].startswith(("confirmed", "our choice")) for row in rows)


def test_the_pages_are_current():
    assert (method_tables.FOLDER / "writing.md").read_text(encoding="utf-8") == method_tables.writing_page()
    assert (ROOT / "prompts" / "README.md").read_text(encoding="utf-8") == readme()


def test_every_prompt_card_loads_and_has_a_title():
    names = list(list_cards("prompts"))
    assert len(names) >= 12 and all(load_prompt(name).title for name in names)
