"""A-OKVQA (Schwenk et al. 2022): multiple choice, and direct answers."""

from __future__ import annotations

from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.coco import coco_image
from mmkd.data.formats import Format
from mmkd.data.reading import choice_question, free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "aokvqa")
class AOKVQA(Format):
    """A-OKVQA's multiple choice: aokvqa_v1p0_{split}.json, pictures in COCO's {split}2017."""

    files = {"annotations": "aokvqa_v1p0_{split}.json"}
    images = {"images": "{split}2017"}
    values = {"image_name": "{id}.jpg"}

    def read(self, source: Source) -> list[Question]:
        return source.made(source.unread(), partial(self.question, source))

    def question(self, source: Source, row: Row) -> Question:
        answer = row.integer("correct_choice_idx") if row.has("correct_choice_idx") else None
        fields = {"question": row.text("question"), "images": (coco_image(source, row),)}
        return choice_question(row, row.identifier("question_id"), row.texts("choices"), answer, **fields)


@register("formats", "aokvqa_direct")
class AOKVQADirect(AOKVQA):
    """A-OKVQA's direct answers: questions that are marked as too difficult for one are left out, as officially."""

    def read(self, source: Source) -> list[Question]:
        return source.made((row for row in source.rows() if not _is_difficult(row)), partial(self.question, source))

    def question(self, source: Source, row: Row) -> Question:
        references = tuple(row.texts("direct_answers")) if row.has("direct_answers") else ()
        fields = {"question": row.text("question"), "images": (coco_image(source, row),)}
        return free_question(row.identifier("question_id"), references, **fields)


def _is_difficult(row: Row) -> bool:
    value = row.value.get("difficult_direct_answer", False)
    if not isinstance(value, bool):
        raise row.wrong("difficult_direct_answer", "true or false")
    return value
