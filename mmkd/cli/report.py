"""`mmkd report`: the report of a run and the model card of its student, from the files of its evaluations."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.model_card import write_model_card
    from mmkd.evaluation.report import build_report

    print(build_report(arguments.folder))
    if card := write_model_card(arguments.folder):
        print(card)
    return 0
