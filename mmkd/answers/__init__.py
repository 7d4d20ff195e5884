"""Answer sources: where the answers that a training step learns from come from.

A step asks its source for micro-batches. `data` gives them as the data have them; a source that lets the student or a teacher
answer generates, and collates the new answers with the same collator, so that rows, targets and counts stay right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from mmkd.errors import DataError
from mmkd.registry import registry


class AnswerSource(ABC):
    """Gives the micro-batches of an optimiser step."""

    @abstractmethod
    def take(self, coming: Iterator[Any], count: int) -> list[Any]:
        """At most `count` micro-batches; fewer at the end of an epoch.

        coming: the loader's, each {"batch": Batch}, with the answers of the data.
        """


def answer_source(shares: Mapping[str, float]) -> AnswerSource:
    """The source of a stage's `answers:`. Raises DataError for shares of several sources, which none of them mixes yet."""
    used = [name for name, share in shares.items() if share > 0]
    if len(used) != 1:
        known = ", ".join(registry("answers"))
        raise DataError(f"answers: {dict(shares)} mixes several sources; give one of {known} the share 1")
    return registry("answers").get(used[0])()
