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
    parser.add_argument("--dry-run", action="store_true", help="with --offline: check the recipe, print sizes and memory")
    parser.add_argument("--offline", action="store_true", help="with --dry-run: no weights and no data, from configurations")
    add_restart(parser)
    add_seeds(parser)


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.errors import RecipeError
        from mmkd.retrieval.recipe import MatchingRecipe, load_ranking_recipe

        if arguments.offline != arguments.dry_run:
            raise RecipeError("`mmkd rank` has a dry run without weights and data alone; give --dry-run and --offline together")
        recipe = load_ranking_recipe(arguments.recipe, arguments.overrides)
        if arguments.dry_run:
            if isinstance(recipe, MatchingRecipe):
                raise RecipeError("--dry-run --offline is for recipes of kind `ranking`")
            from mmkd.runs.offline import plan_ranking_offline

            print(plan_ranking_offline(recipe))
            return 0
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
