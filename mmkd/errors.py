"""What mmkd raises when a user's input is wrong: the message says what is wrong, with the values, and the way out.

The command line prints the message without a traceback and ends with the error's exit code: 2, or 3 for `NotFiniteError`.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class MmkdError(ValueError):
    """Something that the user gave is wrong or does not fit. sample: the id of the one sample that it is about."""

    sample: str | None = None

    code = 2  # exit code of a command that it ends


class DataError(MmkdError):
    """Data, a file or a folder is wrong."""


class ImageError(DataError):
    """One picture cannot be read. Training skips these, up to a limit; evaluation reports the row."""


class SampleError(DataError):
    """One sample cannot be prepared; the message names it. Training skips these, up to a limit; evaluation reports the row."""


class RecipeError(DataError):
    """A recipe is wrong; the message lists every error."""


class GuardError(DataError):
    """A run would not teach what it is meant to; the message says why and how to go on all the same."""


class NotFiniteError(MmkdError):
    """A computed value is NaN or infinite; nothing that depends on it is written."""

    code = 3


class TowerError(MmkdError):
    """A model cannot be used as the tower that was asked for."""


class RegistryError(MmkdError):
    """A name is not registered, or is registered twice, or a module that registers names cannot be imported."""


def one_line(error: object, length: int = 300) -> str:
    """An error's own words, or any value's text, on one line and no longer than this."""
    try:
        text = str(error)
    except ValueError:  # a number of more digits than Python writes
        text = f"a {type(error).__name__} that is too long to be shown"
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: object, length: int = 120) -> str:
    """A value as it would be written in Python, short however long it is; also of numbers that Python does not write."""
    try:
        return one_line(repr(value), length)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too long to be shown"


_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that turn the direction of writing


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor, change its title or turn its writing round is written out instead."""
    def odd(c: str) -> bool:
        return c in _TURNS or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")

    return "".join(ascii(c)[1:-1] if odd(c) else c for c in text)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?" for a close name, else "known: a, b, c"."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return "known: " + (", ".join(options) or "none")
