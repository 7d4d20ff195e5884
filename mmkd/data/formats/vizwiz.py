"""VizWiz-VQA (Gurari et al. 2018)."""

from __future__ import annotations

from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import answer_texts, free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "vizwiz")
class VizWiz(Format):
    """VizWiz: {split}.json, a list of {image, question, answers}; a question goes by its picture's name."""

    files = {"annotations": "{split}.json"}
    images = {"images": "{split}"}

    def read(self, source: Source) -> list[Question]:
        return source.made(source.unread(), partial(_question, source))


def _question(source: Source, row: Row) -> Question:
    image = row.text("image")
    return free_question(
        image,
        answer_texts(row),
        question=row.text("question"),
        images=(source.image(image, where=row.where),),
        categories={"answer_type": row.text("answer_type")} if row.has("answer_type") else {},
    )
