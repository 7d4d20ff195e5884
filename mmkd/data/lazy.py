"""Sequences whose entries are made when they are asked for: large data sets, of which each process holds next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from mmkd.errors import DataError

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """`make` of each entry of `of`. places: which entries, in order; None for all.

    An entry of which nothing can be made (DataError) gives way to the next one that does: nobody has looked at all of them.
    """

    def __init__(self, of: Sequence[Any], make: Callable[[Any], T], places: np.ndarray | None = None):
        self.of, self.make, self.places = of, make, places

    def __len__(self) -> int:
        return len(self.of) if self.places is None else len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[T]: ...
    def __getitem__(self, index: int | slice) -> T | Lazy[T]:
        if isinstance(index, slice):
            return self.taken(np.arange(*index.indices(len(self))))
        first = index = range(len(self))[index]
        while True:
            try:
                return self.make(self.of[index if self.places is None else int(self.places[index])])
            except DataError:
                index = (index + 1) % len(self)
                if index == first:
                    raise

    def taken(self, places: np.ndarray) -> Lazy[T]:
        """The entries at some places, which may repeat."""
        return Lazy(self.of, self.make, places if self.places is None else self.places[places])

    def then(self, make: Callable[[T], Any]) -> Lazy[Any]:
        """What `make` makes of each entry."""
        return Lazy(self.of, _Both(self.make, make), self.places)


class _Both:
    def __init__(self, first: Callable[[Any], Any], second: Callable[[Any], Any]):
        self.first, self.second = first, second

    def __call__(self, entry: Any) -> Any:
        return self.second(self.first(entry))


class Joined(Sequence[T], Generic[T]):
    """Sequences one behind another."""

    def __init__(self, parts: Sequence[Sequence[T]]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Lazy(self, _same, np.arange(*index.indices(len(self))))
        index = range(len(self))[index]
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def _same(entry: T) -> T:
    return entry


def taken(items: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """The entries at some places: a list, unless entries are made when they are asked for."""
    if not is_lazy(items):
        return [items[place] for place in places]
    chosen = np.array(places, dtype=np.int64)
    return items.taken(chosen) if isinstance(items, Lazy) else Lazy(items, _same, chosen)


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """All entries of some sequences: a list, unless one of them makes its entries when they are asked for."""
    if any(isinstance(part, Lazy | Joined) for part in parts):
        return parts[0] if len(parts) == 1 else Joined(parts)
    return [entry for part in parts for entry in part]


def is_lazy(items: Sequence[Any]) -> bool:
    """Whether the entries are made when they are asked for, so that nobody should ask for all of them."""
    return isinstance(items, Lazy | Joined)
