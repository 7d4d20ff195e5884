"""`mmkd check`: whether a model, or tiny models of all families, work as towers; where a kept step stops being finite."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmkd.cli.arguments import add_reading, positive
from mmkd.cli.startup import quick_imports
from mmkd.errors import DataError, NotFiniteError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="folder or hub id of an image-text model, or steps that a run kept: RUN/not_finite"
    )
    parser.add_argument("--families", nargs="*", metavar="NAME", help="instead: tiny models of all families, or of these")
    parser.add_argument("--json", metavar="FILE", help="write the families' results there")
    parser.add_argument(
        "--workers", type=positive, default=None, metavar="N", help="families at a time (default: processor cores)"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.families is not None:
        return _check_families(arguments)
    if arguments.model is None:
        raise DataError("give a model to check, or --families")
    with quick_imports():
        from mmkd.testing import check_rows, check_tower
        from mmkd.testing.replay import is_kept, replay_all
        from mmkd.towers.reading import Reading
        from mmkd.towers.tower import Tower

    if is_kept(Path(arguments.model)):
        steps = replay_all(Path(arguments.model))
        print(json.dumps(steps, indent=1))
        return 0 if all(facts["finite"] for facts in steps.values()) else NotFiniteError.code
    reading = Reading(arguments.processor, arguments.chat_template, arguments.template)
    trusted = arguments.trust_remote_code
    tower = Tower.load(arguments.model, dtype="float32", trust_remote_code=trusted, reading=reading)
    facts = check_tower(tower) if tower.has_visual_tokens else {"only a teacher of rows": tower.lacks(), **check_rows(tower)}
    print(json.dumps(facts, indent=1))
    return 0


def _check_families(arguments: argparse.Namespace) -> int:
    from mmkd.testing.family_check import check_families, families_table, write_results

    results = check_families(arguments.families, workers=arguments.workers)
    if arguments.json:
        write_results(results, Path(arguments.json))
    print(families_table(results))
    return 0
