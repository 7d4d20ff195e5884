"""What mmkd raises when a user's input is wrong: the message says what is wrong, with the values, and the way out.

The command line prints the message without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmkdError(ValueError):
    """Something that the user gave is wrong or does not fit. sample: the id of the one sample that it is about."""

    sample: str | None = None


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


class TowerError(MmkdError):
    """A model cannot be used as the tower that was asked for."""


class RegistryError(MmkdError):
    """A name is not registered, or is registered twice, or a module that registers names cannot be imported."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?" for a close name, else "known: a, b, c"."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return "known: " + (", ".join(options) or "none")
