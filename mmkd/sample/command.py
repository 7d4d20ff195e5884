"""`mmkd sample`: the embedded sample, written to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default=None, metavar="train=N,val=N,test=N", help="scenes of each data set by split")
    texts = parser.add_mutually_exclusive_group()
    for of, what in (("writings", "texts that teach a model to write data"), ("statements", "statements to make and to judge")):
        texts.add_argument(f"--{of}", dest="of", action="store_const", const=of, help=f"instead, {what}")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.errors import DataError
    from mmkd.sample.sample_set import write_sample_set

    sizes = None
    if arguments.sizes:
        try:
            sizes = {k: int(v) for k, v in (part.split("=") for part in arguments.sizes.split(","))}
        except ValueError as error:
            raise DataError(f"--sizes {arguments.sizes!r} is not of the form train=3000,val=200,test=400") from error
    write_sample_set(Path(arguments.folder), seed=arguments.seed, sizes=sizes, of=arguments.of)
    print(arguments.folder)
    return 0
