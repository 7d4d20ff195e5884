"""The two answers of a preference pair: a sample ends with the preferred one and keeps the other."""

from __future__ import annotations

from dataclasses import replace

from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError

REJECTED = "rejected"  # key of `Sample.meta` that holds the answer not preferred


def rejected_of(sample: Sample) -> Sample:
    """The same prompt and pictures with the rejected answer. Raises DataError for a sample that is no pair."""
    if REJECTED not in sample.meta:
        raise DataError(
            f"sample {sample.id!r} has one answer, not a chosen and a rejected one; preference terms need data of "
            "`format: preference` in all of their stage"
        )
    return replace(sample, turns=(*sample.prompt_turns, Turn("assistant", sample.meta[REJECTED])))
