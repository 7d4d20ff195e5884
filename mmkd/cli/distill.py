"""`mmkd distill`: a recipe or a grid of recipes, to models, summary and report."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from mmkd.cli.arguments import add_recipe, add_restart, add_seeds
from mmkd.cli.seeds import run_seeds
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(
        parser, "a YAML file, the name of one in scripts/recipes, or pair:NAME (`mmkd list models`) with data=FOLDER",
        "for example stages.sft.steps=100 seed=1",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan with its memory")
    parser.add_argument(
        "--offline", action="store_true", help="with --dry-run: no weights and no data, sizes and memory from configurations"
    )
    add_restart(parser)
    add_seeds(parser)


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.errors import RecipeError
        from mmkd.recipes.reading import load_recipe, read_raw

    if arguments.offline and not arguments.dry_run:
        raise RecipeError("--offline is a kind of --dry-run; give both, or leave --offline out")
    if read_raw(arguments.recipe, arguments.overrides).get("kind") == "ablation":
        return _run_grid(arguments)
    with quick_imports():  # a recipe imports what it names, and is refused before the rest is imported
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.run import distill, table
    if arguments.dry_run:
        from mmkd.runs.offline import plan_offline
        from mmkd.runs.plan import plan

        print(plan_offline(recipe) if arguments.offline else plan(recipe))
        return 0
    if arguments.seeds is not None:
        run_seeds(recipe, arguments.seeds, partial(distill, anew=arguments.restart))
        return 0
    summary = distill(recipe, anew=arguments.restart)
    if summary:
        print(table(summary))
        if "report" in summary:
            print(f"report: {summary['report']}")
    return 0


def _run_grid(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.errors import DataError
        from mmkd.runs.ablation import ablate, ablation_table, load_grid

    if arguments.restart:
        raise DataError("--restart is for one recipe; of a grid, delete the runs that are to start anew")
    seeds = [] if arguments.seeds is None else [f"seeds=[{arguments.seeds}]"]
    grid, runs = load_grid(arguments.recipe, [*arguments.overrides, *seeds])
    if arguments.dry_run:
        print("\n".join(f"{run.name}: {run.folder}{' (done)' if run.summary else ''}" for run in runs))
        return 0
    name = Path(arguments.recipe).stem
    print(ablation_table(ablate(grid, runs, name)))
    print(Path(grid.output) / f"{name}.svg")
    return 0
