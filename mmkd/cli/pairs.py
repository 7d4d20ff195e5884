"""`mmkd pairs`: preference pairs from the answers of models to training questions."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("right", help="results folder of `mmkd evaluate --split train` of the model with the right answers")
    parser.add_argument("wrong", nargs="+", help="the same of models whose wrong answers are rejected")
    parser.add_argument("--data-root", required=True, help="folder that holds the pictures; their names are written below it")
    parser.add_argument(
        "--output", required=True, help="the JSON lines file to write, for example DATA_ROOT/preference/train.jsonl"
    )
    parser.add_argument("--split", default="train", help="the split that the questions must be of (default: train)")
    parser.add_argument(
        "--every-question", action="store_true", help="also where none is wrong: an answer given to it elsewhere"
    )
    parser.set_defaults(listed="wrong")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.preference_pairs import write_pairs

    facts = write_pairs(
        Path(arguments.right),
        [Path(folder) for folder in arguments.wrong],
        Path(arguments.output),
        Path(arguments.data_root),
        split=arguments.split,
        every_question=arguments.every_question,
    )
    for name, counts in facts.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    print(arguments.output)
    return 0
