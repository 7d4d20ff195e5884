"""`mmkd cache`: the teacher's signals for the samples of a recipe, written once and read by every training."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmkd.cli.arguments import add_recipe, natural, positive
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "a YAML file, see scripts/recipes", "teacher.cache=FOLDER says where it goes")
    parser.add_argument(
        "--top-k", type=positive, default=None, metavar="K", help="keep the K likeliest tokens, not hidden states"
    )
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--workers", type=natural, default=2, help="processes that read pictures")
    parser.add_argument("--forecast", action="store_true", help="say how large it will be, and stop")


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.reading import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.write_cache import describe, write_cache

    spec = recipe.teacher
    folder = Path(spec.cache) if spec is not None and spec.cache else Path(recipe.output).parent / "teacher_cache"
    facts = write_cache(
        recipe, folder, top_k=arguments.top_k, batch_size=arguments.batch_size, workers=arguments.workers,
        forecast_only=arguments.forecast,
    )  # fmt: skip
    print(facts.get("forecast", "no rows to keep") if arguments.forecast else describe(facts, arguments.recipe))
    return 0
