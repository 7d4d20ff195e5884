"""`mmkd rank`: recipes for dual encoders and for the cross-encoders that teach them."""

from __future__ import annotations

import argparse
from functools import partial

from mmkd.cli.arguments import add_recipe, add_restart, add_seeds
from mmkd.cli.seeds import run_seeds
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(
        parser,
        "a YAML file with `kind: ranking` or `kind: matching`, see scripts/recipes/cprd_*.yaml",
        "for example ranking.weight=0.5 seed=1",
    )
    add_restart(parser)
    add_seeds(parser)


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.retrieval.recipe import MatchingRecipe, load_ranking_recipe

        recipe = load_ranking_recipe(arguments.recipe, arguments.overrides)
        from mmkd.retrieval.run import rank, train_matching
        from mmkd.retrieval.summary import ranking_table

    train = partial(train_matching if isinstance(recipe, MatchingRecipe) else rank, anew=arguments.restart)
    if arguments.seeds is not None:
        run_seeds(recipe, arguments.seeds, train)
        return 0
    summary = train(recipe)
    if summary:
        print(ranking_table(summary))
    return 0
