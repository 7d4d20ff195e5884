"""Texts as they are compared: without case, punctuation and white space, or as words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def folded(text: str) -> str:
    """A text without case, punctuation, symbols, white space and forms of the same character (NFKC): what re-wording by these
    leaves. A text of nothing else, such as "->", keeps its symbols."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(c for c in plain if c.isalnum() or unicodedata.category(c)[0] == "M")
    return kept or "".join(plain.split())


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def spaced(text: str) -> str:
    """The words of a text with one space between and around them, so that `spaced(a) in spaced(b)` compares whole words."""
    return f" {' '.join(words_of(text))} "


def texts_in(value: object) -> Iterator[str]:
    """All texts in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
