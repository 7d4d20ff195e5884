"""`mmkd evaluate`: benchmarks or a suite, with or without pictures, to results on disk and lines on the terminal."""

from __future__ import annotations

import argparse
from functools import partial

from mmkd.cli.arguments import add_reading, names, positive
from mmkd.cli.startup import quick_imports

ATTENTION = ["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]  # as in recipes
LINES = partial(print, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of an image-text model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--benchmarks", type=names, help="names or card files, separated by commas")
    which.add_argument("--suite", help="name or card file of a suite: its benchmarks and their average")
    parser.add_argument("--server-scores", default="", metavar="vqav2=77.7,...", help="what test servers gave to a suite")
    parser.add_argument("--data-root", help="folder that holds the benchmarks' downloaded files")
    parser.add_argument("--output", default=None, help="folder for results (default: runs/evaluation/MODEL)")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--limit", type=int, default=None, help="score a seeded subset of so many questions")
    parser.add_argument(
        "--split", default=None, help="another split than the benchmark's, for example train (see `mmkd pairs`)"
    )
    parser.add_argument("--blind", action="store_true", help="take the pictures away: what the words alone give")
    parser.add_argument("--importance", action="store_true", help="ask with and without pictures: which questions need them")
    parser.add_argument("--choices", default="generation", choices=["generation", "likelihood"], help="of multiple choice")
    parser.add_argument("--submission", action="store_true", help="write the test servers' files")
    parser.add_argument(
        "--missing-pictures", type=float, default=0.01, metavar="SHARE",
        help="share of a benchmark's pictures that may be missing; above it nothing is asked (default: 0.01)",
    )  # fmt: skip
    parser.add_argument("--cache-mb", type=int, default=1024, help="room for visual tokens of pictures with open questions")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--quantise", default=None, choices=["8bit", "4bit", "q4_0", "q8_0", "nf4"],
        help="8bit, 4bit: loaded so by bitsandbytes; q4_0, q8_0 (llama.cpp), nf4: with the values that the format would hold",
    )  # fmt: skip
    parser.add_argument("--attn-implementation", default=None, choices=ATTENTION, help="how attention is computed")
    parser.add_argument("--trust-remote-code", action="store_true")
    add_reading(parser)
    parser.add_argument(
        "--imports", type=names, default=[], metavar="MODULE,...", help="modules of your own: formats, metrics, encoders"
    )


def run(arguments: argparse.Namespace) -> int:
    from mmkd.errors import DataError
    from mmkd.registry import import_modules

    import_modules(arguments.imports)
    if arguments.server_scores and not arguments.suite:
        raise DataError("--server-scores belong to a --suite")
    with quick_imports():
        from mmkd.runs.evaluate import EvaluationOptions, evaluate, evaluate_suite, output_folder

    given = {name: value for name, value in vars(arguments).items() if name in EvaluationOptions.__dataclass_fields__}
    options = given | {"show": LINES}
    if arguments.suite:
        found = evaluate_suite(arguments.model, arguments.suite, arguments.server_scores, **options)
    else:
        found = evaluate(arguments.model, arguments.benchmarks, **options)
    if found:
        print(f"results: {output_folder(arguments.model, arguments.output)}")
    return 0
