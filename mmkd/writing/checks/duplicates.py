"""Rows that say what an earlier row said."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check
from mmkd.writing.words import folded

_SHINGLE = 5  # characters
_BANDS, _ROWS = 32, 4  # of min-hashes: texts of similarity 0.7 meet in a band with probability 0.9998, of 0.8 with 1 - 5e-8


@register("checks", "duplicates")
@dataclass
class Duplicates(Check):
    """Drops what an earlier row on the same pictures says, up to case, punctuation and white space.

    of: the texts that are compared, together.  near: similarity from which on other words are a duplicate, too: the share of
    pieces of five characters that two texts have in common (Jaccard).  pictures: false compares rows on all pictures with one
    another."""

    of: tuple[Literal["question", "answer"], ...] = ("question", "answer")
    near: Annotated[float, Field(ge=0.6, le=1)] | None = None
    pictures: bool = True

    def start(self) -> None:
        self._exact: set[bytes] = set()
        self._near: dict[bytes, _Texts] = defaultdict(_Texts)

    def refuse(self, one: Candidate) -> str | None:
        shown = "\n".join(sorted(picture.key for picture in one.pictures)) if self.pictures else ""
        text = "\0".join(folded(one.row[name]) for name in self.of)
        key = hashlib.blake2b(f"{shown}\0{text}".encode("utf-8", "replace"), digest_size=12).digest()
        if key in self._exact:
            return "the same"
        if self.near is not None:
            group = hashlib.blake2b(shown.encode("utf-8", "replace"), digest_size=8).digest()
            if not self._near[group].add(text, self.near):
                return "nearly the same"
        self._exact.add(key)
        return None


class _Texts:
    """Texts of which none is similar to another: found by bands of min-hashes, then compared piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._bands: dict[bytes, list[int]] = defaultdict(list)

    def add(self, text: str, near: float) -> bool:
        """Whether it is new; a text that is similar to one that is there is not taken."""
        pieces = _pieces(text)
        if len(self._pieces) < 16:  # few: each is compared
            found, bands = range(len(self._pieces)), _bands(pieces)
        else:
            bands = _bands(pieces)
            found = {number for band in bands for number in self._bands.get(band, ())}
        for number in found:
            other = self._pieces[number]
            shared = len(np.intersect1d(pieces, other, assume_unique=True))
            if shared >= near * (len(pieces) + len(other) - shared):
                return False
        for band in bands:
            self._bands[band].append(len(self._pieces))
        self._pieces.append(pieces)
        return True


def _pieces(text: str) -> np.ndarray:
    parts = {text[n : n + _SHINGLE] for n in range(max(1, len(text) - _SHINGLE + 1))}
    hashes = [int.from_bytes(hashlib.blake2b(p.encode("utf-8", "replace"), digest_size=4).digest(), "big") for p in parts]
    return np.unique(np.array(hashes, dtype=np.uint64))


_DRAWS = np.random.default_rng(17).integers(1, 2**31 - 1, size=(2, _BANDS * _ROWS), dtype=np.uint64)


def _bands(pieces: np.ndarray) -> list[bytes]:
    mixed = (_DRAWS[0][:, None] * pieces[None, :] + _DRAWS[1][:, None]) % np.uint64(2**31 - 1)  # [hashes, pieces]
    least = mixed.min(1).astype(np.uint32).reshape(_BANDS, _ROWS)
    return [bytes([number]) + row.tobytes() for number, row in enumerate(least)]
