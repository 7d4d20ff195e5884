"""`mmkd compare`: several models on the same questions, to the terminal, to comparison.json and to one report."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]FOLDER", help="results of `mmkd evaluate`, or runs of `mmkd distill`"
    )
    parser.add_argument("--output", default="runs/compared", help="folder for comparison.json and report.html")
    parser.add_argument("--title", default="Comparison", help="of the report")
    parser.set_defaults(listed="models")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.compare import compare, comparison_table

    found = compare(arguments.models, arguments.output, title=arguments.title)
    for name, comparison in found["benchmarks"].items():
        print(comparison_table(name, comparison))
    if len(found["models"]) > 1 and not any(comparison["differences"] for comparison in found["benchmarks"].values()):
        print(f"no two of {', '.join(found['models'])} have answered the same benchmark, so there is no difference to report")
    print(f"report: {Path(arguments.output) / 'report.html'}")
    return 0
