"""`mmkd write`: what the write stages of a recipe write, without training; any number of processes share the work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmkd.cli.arguments import add_recipe, names
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "a YAML file with stages of `kind: write`", "for example stages.ask.samples=5")
    parser.add_argument("--stages", type=names, default=None, metavar="NAME,...", help="write these alone, and what they read")


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.reading import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.writes import write_all
        from mmkd.writing.rows import FACTS, Receipt

    for name, folder in write_all(recipe, arguments.stages).items():
        facts = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        print("\n  ".join([f"{name}: {folder}", *Receipt.of(facts).lines()]))
    return 0
