"""VQA's pair of files: VQA v2, OK-VQA."""

from __future__ import annotations

from mmkd.data.annotations import Row
from mmkd.data.coco import COCO_IMAGES, COCO_NAMES, coco_image
from mmkd.data.formats import Format
from mmkd.data.reading import answer_texts, free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register


@register("formats", "vqa")
class VQA(Format):
    """VQA's pair of files: {"questions": [...]} and, but for test splits (""), {"annotations": [...]}."""

    files = {
        "questions": "v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": "v2_mscoco_{split}_annotations.json",
    }
    images = COCO_IMAGES
    values = COCO_NAMES

    def read(self, source: Source) -> list[Question]:
        answers: dict[str, Row] = {}
        if source.has("annotations"):
            answers = {row.identifier("question_id"): row for row in source.rows("annotations", "annotations")}
        return source.made(source.unread("questions", "questions"), lambda row: _question(source, row, answers))


def _question(source: Source, row: Row, answers: dict[str, Row]) -> Question:
    name = row.identifier("question_id")
    if answers and name not in answers:
        raise DataError(f"{row.where}: question {name} has no row in {source.names('annotations')}")
    found = answers.get(name)
    categories = {key: found.text(key) for key in ("answer_type", "question_type") if found and found.has(key)}
    references = answer_texts(found) if found else ()
    return free_question(
        name, references, question=row.text("question"), images=(coco_image(source, row),), categories=categories
    )
