"""`mmkd show`: samples of a recipe as student and teachers read them, as text or as a page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmkd.cli.arguments import add_recipe, positive
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "a YAML file, the name of one in scripts/recipes, or pair:NAME", "for example max_length=512")
    parser.add_argument("--samples", type=positive, default=3, metavar="N", help="of each data entry (default: 3)")
    parser.add_argument("--html", type=Path, default=None, metavar="FILE", help="write a page with pictures, in place of text")


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.errors import DataError, RecipeError
        from mmkd.recipes.reading import load_recipe, read_raw

    if read_raw(arguments.recipe, arguments.overrides).get("kind") == "ablation":
        raise RecipeError(f"{arguments.recipe} is a grid of recipes; show one recipe of it")
    page = arguments.html
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        wrong = "this is a folder" if page.is_dir() else "its folder is not there"
        raise DataError(f"--html {page}: {wrong}; give a file to write")
    with quick_imports():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.show import as_page, as_text, show
    shown = show(recipe, arguments.samples)
    if page is None:
        print(as_text(shown, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
        return 0
    from mmkd.base.files import write_whole

    write_whole(page, as_page(shown))
    print(f"page: {page}")
    return 0
