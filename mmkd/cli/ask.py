"""`mmkd ask`: a question about a picture, to one model or to several side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mmkd.cli.arguments import add_reading, names, positive
from mmkd.cli.startup import quick_imports

HELP = "a question; the path of a picture takes its place; an empty line ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="MODEL... PICTURE... QUESTION",
        help="folders, hub ids or runs (their teacher, controls and student), then pictures, then a question in quotes; without "
        "a question it is asked for",
    )  # fmt: skip
    parser.add_argument("--like", default=None, metavar="BENCHMARK", help="ask with its prompt and its length of answers")
    parser.add_argument("--style", default="plain", help="of the prompt: plain (the question as it stands) or short")
    parser.add_argument("--max-new-tokens", type=positive, default=None, help="of an answer (default: 128)")
    parser.add_argument("--dtype", default=None, choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--quantise", default=None, choices=["8bit", "4bit"])
    parser.add_argument("--trust-remote-code", action="store_true")
    add_reading(parser)
    parser.add_argument("--imports", type=names, default=[], metavar="MODULE,...", help="modules of your own: encoders")
    parser.set_defaults(listed="words")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.errors import MmkdError, printable
    from mmkd.registry import import_modules

    import_modules(arguments.imports)
    with quick_imports():
        from mmkd.runs import ask
        from mmkd.towers.reading import Reading

    models, pictures, question = ask.sort_words(arguments.words)
    asking = ask.Asking(arguments.style, arguments.like, arguments.max_new_tokens)
    asking.sample(pictures, question or "a question?")  # pictures and prompt are looked at before models are loaded
    length = asking.length
    given = {"quantise": arguments.quantise, "trust_remote_code": arguments.trust_remote_code, "dtype": arguments.dtype}
    reading = Reading(arguments.processor, arguments.chat_template, arguments.template)
    towers = ask.load_models(models, reading, **given)
    width = min(40, max(map(len, towers))) if len(towers) > 1 else 0

    def put(text: str) -> None:
        for name, answer in ask.answers(towers, asking.sample(pictures, text), length):
            print(printable(ask.lines_of(name, answer, width)), flush=True)

    if question is not None:
        put(question)
        return 0
    print(HELP, file=sys.stderr)
    while text := _line():
        if ask.looks_like_picture(text):
            pictures = _other_picture(Path(text), pictures)
            continue
        try:
            put(text)
        except MmkdError as error:  # of this question; the next may do
            print(printable(f"mmkd: {error}"), file=sys.stderr)
    return 0


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _other_picture(path: Path, pictures: list[Path]) -> list[Any]:
    from mmkd.errors import DataError
    from mmkd.runs.ask import picture_of

    try:
        picture_of(path)
    except DataError as error:
        print(f"mmkd: {error}", file=sys.stderr)
        return pictures
    return [path]
