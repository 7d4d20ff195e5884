"""What reading a split left out, and which keys of its rows nobody read."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmkd.errors import DataError

logger = logging.getLogger(__name__)

NAMED = 3  # rows of one reason that are named
AT_LEAST = 512  # rows of a stream that a share is taken of when fewer were read
REASONS = 8  # reasons that are listed
# What a message says of one row alone: its texts and numbers, but not the names of keys and speakers.
_OWN = re.compile(r"(?<!key )(?<!turn of )(?<!speaker )('[^']*'|\"[^\"]*\")|\d[\d,.]*")


@dataclass
class Tally:
    """rows: so many were read; of a large file `of` is how many there are.  dropped, first: by reason where rows stand that
    cannot be used, and the first error.

    keys: how many rows have each key.  used: keys that the format asked for, whether or not a row has them.  pictured: items
    with a picture, among `items`.
    """

    rows: int = 0
    of: int | None = None
    dropped: dict[str, list[str]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    keys: Counter[str] = field(default_factory=Counter)
    used: set[str] = field(default_factory=set)
    items: int = 0
    pictured: int = 0
    own: bool = False  # whether the rows are laid out by the user, who then wants to know which keys nobody reads

    def drop(self, where: str, error: DataError) -> None:
        """Counts a row that cannot be used."""
        message = str(error)
        reason = _OWN.sub("…", message.removeprefix(where).lstrip(": "))[:120]
        self.dropped.setdefault(reason, []).append(where)
        self.first.setdefault(reason, message)

    def made(self, items: Sequence[Any]) -> None:
        """Counts what was made of the rows."""
        self.items = len(items)
        self.pictured = sum(bool(item.images) for item in items)

    @property
    def count(self) -> int:
        """Rows that cannot be used, of those that were read."""
        return sum(map(len, self.dropped.values()))

    @property
    def unused(self) -> list[str]:
        """Keys of rows that nobody read."""
        return [key for key in self.keys if key not in self.used]

    def reasons(self) -> str:
        """The rows that cannot be used, in words: counts by reason, the first few named."""
        found = []
        for reason, places in sorted(self.dropped.items(), key=lambda entry: -len(entry[1]))[:REASONS]:
            named = ", ".join(place.rpartition("/")[2] for place in places[:NAMED]) + (", ..." if len(places) > NAMED else "")
            found.append(f"{len(places):,}: {reason} ({named})")
        further = len(self.dropped) - REASONS
        return "; ".join(found) + (f"; and {further} further reasons" if further > 0 else "")

    def check(self, allowed: float) -> None:
        """Raises DataError, with all reasons, where more than the share `allowed` of the rows cannot be used."""
        if not self.count or (self.count <= math.ceil(allowed * self.rows) and self.count < self.rows):
            return
        (first, *_) = self.first.values()
        if self.count == 1:
            raise DataError(first)
        limit = f", more than the share {allowed:g} that may be left out (guards.max_skipped)" if allowed else ""
        raise DataError(f"{first}. In all {self.count:,} of {self.rows:,} rows cannot be used{limit}: {self.reasons()}")

    def check_stream(self, allowed: float) -> None:
        """Logs the latest row of a stream that cannot be used; raises DataError where there are more than the share `allowed`."""
        reason = next(reversed(self.first))
        if self.count > math.ceil(allowed * max(self.rows, AT_LEAST)):
            self.check(0.0)
        if self.count <= NAMED:
            logger.warning("left out: %s", self.first[reason])

    def lines(self) -> list[str]:
        """What a reader should know, a line each."""
        seen = f"of {self.rows:,} rows" + (f" that were looked at (there are {self.of:,})" if self.of else "")
        found = []
        if self.count:
            found.append(f"{self.count:,} {seen} cannot be used and are left out: {self.reasons()}")
        if self.items and self.pictured < self.items:
            found.append(f"pictures in {self.pictured:,} of {self.items:,} samples")
        if self.own and self.unused:
            found.append(f"keys or columns not used: {', '.join(sorted(self.unused))}")
        return found

    def refuse_no_pictures(self, where: str, keys: str) -> None:
        """Raises DataError where no item has a picture. keys: what names pictures."""
        if self.items and not self.pictured:
            unused = f"; keys or columns not used: {', '.join(sorted(self.unused))}" if self.unused else ""
            raise DataError(
                f"{where}: pictures in 0 of {self.items:,} samples{unused}. Pictures are named by {keys}; if there are none, say "
                "so by `text_only: true` (in the data entry, or in the benchmark's card)"
            )
