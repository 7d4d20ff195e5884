"""`mmkd report`: the report of a run, from the files of its evaluations."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.report import build_report

    print(build_report(arguments.folder))
    return 0
