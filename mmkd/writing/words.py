"""Texts as they are compared: without case, punctuation and white space, or as words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()
_VALUES = {word: float(value) for value, word in enumerate(_NAMES)}
# A sign belongs to a number that stands behind no letter or digit, so that "3-5" has two and "-5" is one.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)|\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
_GLUED = re.compile(r"[^\W\d_]\w*\d\w*|\d\w*[^\W\d_]\w*")


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


def numbers_in(text: str) -> set[float | str]:
    """The numbers of a text: values, of digits ("1,200", "-3.5") and of English words up to twenty, and words of digits and
    letters ("3rd", "b12"). "one" is often no number, and is left out."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    glued = set(_GLUED.findall(plain))
    found = {float(match.replace(",", "")) for match in _NUMBER.findall(_GLUED.sub(" ", plain))}
    return found | glued | {_VALUES[word] for word in re.findall(r"[a-z]+", plain) if word in _VALUES and word != "one"}
