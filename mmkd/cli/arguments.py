"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import Any


def add_recipe(parser: argparse.ArgumentParser, recipe: str, overrides: str | None) -> None:
    """A recipe and its overrides, which may stand before, between and after options; with the help of both."""
    parser.add_argument("recipe", help=recipe)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    parser.set_defaults(listed="overrides")


def add_restart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="delete what the output folder holds of a run, and start anew (default: go on)"
    )


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", default=None, metavar="0,1,2", help="run once a seed and print means with intervals")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How a model reads samples, where that is not as its folder says (`mmkd.towers.reading.Reading`)."""
    parser.add_argument(
        "--processor", type=values, default={}, metavar="KEY=VALUE,...", help="options of its processor, as max_pixels=401408"
    )
    parser.add_argument("--chat-template", default=None, metavar="FILE", help="a chat template in place of the model's own")
    parser.add_argument(
        "--template", type=values, default={}, metavar="KEY=VALUE,...", help="arguments of the template, as enable_thinking=false"
    )


def values(text: str) -> dict[str, Any]:
    """Values by name, each in YAML, with commas between them."""
    import yaml  # for help, nothing is imported

    found = {}
    for part in names(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(f"{part!r} is no KEY=VALUE")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"{value!r} is no value in YAML") from error
    return found


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _at_least(least: int, text: str) -> int:
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)
