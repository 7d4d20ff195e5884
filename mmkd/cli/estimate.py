"""`mmkd estimate`: what a recipe will need, from a few measured steps."""

from __future__ import annotations

import argparse

from mmkd.cli.arguments import add_recipe
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "a YAML file, see scripts/recipes", None)
    parser.add_argument(
        "--memory", type=float, default=None, metavar="GIB", help="must fit into so much (default: what is here)"
    )


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.reading import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.estimate import estimate

    print(estimate(recipe, arguments.memory))
    return 0
