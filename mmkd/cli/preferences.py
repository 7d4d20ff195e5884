"""`mmkd preferences`: how often a model prefers the chosen answers of pairs, measured against a reference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--reference", required=True, help="the teacher, which rewards are measured against")
    parser.add_argument("--pairs", required=True, help="a JSON lines file, as `mmkd pairs` writes it")
    parser.add_argument("--data-root", required=True, help="folder that holds the pictures")
    parser.add_argument("--cache", default="runs/references", help="folder for log-probabilities (default: runs/references)")
    parser.add_argument("--output", default=None, help="JSON file for the figures")


def run(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.base.files import write_whole
        from mmkd.data.formats import read_split
        from mmkd.evaluation.preferences import preference_accuracy
        from mmkd.towers.loading import device_of_process, dtype_of
        from mmkd.towers.tower import Tower

    files = {"annotations": str(Path(arguments.pairs).absolute()), "images": "."}
    samples = read_split("preference", Path(arguments.data_root), "pairs", files=files)
    options = {"dtype": dtype_of("float32"), "device": device_of_process()}
    towers = [Tower.load(model, **options).freeze() for model in (arguments.model, arguments.reference)]
    found = preference_accuracy(*towers, samples, Path(arguments.cache))
    if arguments.output:
        write_whole(Path(arguments.output), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0
