"""Answers as the data have them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmkd.answers import AnswerSource
from mmkd.registry import register


@register("answers", "data")
class DataAnswers(AnswerSource):
    """The answers of the data (the default)."""

    def take(self, coming: Iterator[Any], count: int) -> list[Any]:
        return list(islice(coming, count))
