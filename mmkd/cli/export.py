"""`mmkd export`: a student as a serving engine reads it, and what stands in the way."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmkd.cli.arguments import add_reading, names
from mmkd.cli.startup import quick_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of an image-text model")
    parser.add_argument("output", help="folder for what the engine reads")
    parser.add_argument("--to", required=True, choices=["vllm", "gguf"], help="vllm: a folder; gguf: two files for llama.cpp")
    parser.add_argument(
        "--format", default="f32", choices=["f32", "f16", "q8_0", "q4_0"],
        help="gguf: of the language model's matrices (default: f32); one trained with `quantise` of this name loses nothing",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="ask the engine (the command vllm, the package xllamacpp) and transformers the same 50 questions",
    )  # fmt: skip
    add_reading(parser)
    parser.add_argument("--imports", type=names, default=[], metavar="MODULE,...", help="modules of your own: encoders")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.registry import import_modules

    import_modules(arguments.imports)
    with quick_imports():
        from mmkd.runs.export import export
        from mmkd.towers.reading import Reading

    reading = Reading(arguments.processor, arguments.chat_template, arguments.template)
    for line in export(
        arguments.model, Path(arguments.output), arguments.to, form=arguments.format, check=arguments.check, reading=reading
    ):  # fmt: skip
        print(line, flush=True)
    return 0
