"""POPE (Li et al. 2023): is an object in the picture?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

SAMPLINGS = ("random", "popular", "adversarial")


@register("formats", "pope")
class POPE(Format):
    """POPE: coco_pope_{split}.json of one sampling of absent objects; split `all` is all three."""

    files = {"annotations": "coco_pope_{split}.json"}
    images = {"images": "val2014"}

    def read(self, source: Source) -> list[Question]:
        return [question for part in _samplings(source) for question in part.made(part.unread(), partial(_question, part))]

    def paths(self, source: Source) -> list[Path]:
        return [part.path() for part in _samplings(source)]


def _samplings(source: Source) -> list[Source]:
    """The samplings of the split, each as a source of its own."""
    if source.split not in (*SAMPLINGS, "all"):
        raise DataError(f"POPE has no split {source.split!r}; there are {', '.join(SAMPLINGS)}, all")
    return [source.of_split(name) for name in (SAMPLINGS if source.split == "all" else (source.split,))]


def _question(source: Source, row: Row) -> Question:
    label = row.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise row.wrong("label", "'yes' or 'no'")
    return free_question(
        f"{source.split}-{row.identifier('question_id')}",
        (label,),
        question=row.text("text"),
        images=(source.image(row.text("image"), where=row.where),),
        categories={"sampling": source.split},
    )
