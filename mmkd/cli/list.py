"""`mmkd list`: the cards of a kind, or the names of a kind that recipes and cards can use."""

from __future__ import annotations

import argparse
import sys

from mmkd.cli.arguments import names
from mmkd.registry import PACKAGES

CARDS = ("models", "data", "evaluation", "prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=[*CARDS, *PACKAGES], help="left out: the kinds, and how many each has")
    parser.add_argument("name", nargs="?", help="of a benchmark: its layout, prompt, notes, published scores")
    parser.add_argument("--search", default="", metavar="WORD", help="only those that have the word somewhere")
    parser.add_argument(
        "--imports", type=names, default=[], metavar="MODULE,...", help="modules of your own that register what they bring"
    )


def run(arguments: argparse.Namespace) -> int:
    from mmkd.registry import import_modules

    import_modules(arguments.imports)
    if arguments.kind is None:
        for kind in [*CARDS, *PACKAGES]:
            print(f"{kind:<12} {len(_cards(kind) if kind in CARDS else _registered(kind))}")
        return 0
    if arguments.name:
        print(_benchmark(arguments.kind, arguments.name))
        return 0
    lines = _cards(arguments.kind) if arguments.kind in CARDS else _registered(arguments.kind)
    for line, everything in lines:
        if arguments.search.lower() in everything.lower():
            print(line)
    return 0


def _cards(kind: str) -> list[tuple[str, str]]:
    """A line a card, and the text that is searched."""
    from mmkd.base.cards import list_cards, read_yaml
    from mmkd.errors import DataError, one_line

    found = []
    for name, path in list_cards(kind).items():
        try:
            card = read_yaml(path)
        except DataError as error:  # one bad card must not hide the others
            print(f"mmkd: left out: {error}", file=sys.stderr)
            continue
        found.append((f"{name:<32} {one_line(card.get('title', ''), 200)}", f"{name} {' '.join(map(str, card.values()))}"))
    return found


def _benchmark(kind: str, name: str) -> str:
    """All that a benchmark's card says to a reader."""
    from mmkd.cli.startup import quick_imports
    from mmkd.errors import DataError

    if kind != "evaluation":
        raise DataError(f"only benchmarks are shown by name: `mmkd list evaluation {name}`; try --search {name}")
    with quick_imports():
        from mmkd.evaluation.benchmarks import load_benchmark

        card = load_benchmark(name)
        layout = card.layout()
    rows = f", {card.expected_rows:,} questions" if card.expected_rows else ""
    added = "".join(f", {text!r}" for text in (card.remark, card.instruction) if text)
    return "\n".join([
        f"{card.name}: {card.title}",
        f"  data      {card.root} below --data-root, split {card.split}{rows}, format {card.format}",
        f"  layout    {layout}",
        f"  prompt    style {card.prompt_style}{', with OCR tokens' if card.ocr else ''}{added}",
        f"  scored    parser {card.parser}, {', '.join((card.metric, *card.also))}; up to {card.max_new_tokens} new tokens",
        *(f"  published {score.score:g} {score.model} ({score.subset}); {score.source}" for score in card.reference_scores),
        f"  notes     {card.notes.strip() or 'none'}",
    ])  # fmt: skip


def _registered(kind: str) -> list[tuple[str, str]]:
    """Two or three lines a name: what it is, where it comes from and, if it has some, its options."""
    from mmkd.cli.startup import quick_imports

    with quick_imports():
        from mmkd.registry import registry

        entries = [registry(kind).about(name) for name in registry(kind).names()]
    found = []
    for entry in entries:
        lines = [f"{entry.name:<32} {entry.summary}".rstrip(), f"    from {entry.source}"]
        if entry.options:
            lines.append(f"    options: {', '.join(entry.options)}")
        text = "\n".join(lines)
        found.append((text, text))
    return found
