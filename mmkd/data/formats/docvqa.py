"""The layout of the Robust Reading Competition: DocVQA."""

from __future__ import annotations

from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "docvqa")
class DocVQA(Format):
    """DocVQA: {split}_v1.0_withQT.json with {"data": [...]}, pictures by paths below the root."""

    files = {"annotations": "{split}_v1.0_withQT.json"}
    images = {"images": "."}
    keys = ("questionId", "image", "question_types")  # of a row: its id, its picture, its kinds

    def read(self, source: Source) -> list[Question]:
        return source.made(source.unread("annotations", "data"), partial(self.question, source))

    def question(self, source: Source, row: Row) -> Question:
        name, image, kinds = self.keys
        groups = row.texts(kinds) if kinds and row.has(kinds) else []
        return free_question(
            row.identifier(name),
            tuple(row.texts("answers")) if row.has("answers") else (),
            question=row.text("question"),
            images=(source.image(row.text(image), where=row.where),),
            categories={"kind": groups[0]} if groups else {},
        )
