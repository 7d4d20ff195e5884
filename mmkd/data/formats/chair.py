"""CHAIR (Rohrbach et al. 2018): pictures to be described, and COCO's objects in them."""

from __future__ import annotations

from mmkd.data.annotations import Row
from mmkd.data.coco import COCO_IMAGES, COCO_NAMES, NO_OBJECT, coco_image, coco_object, mentions
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "chair")
class CHAIR(Format):
    """CHAIR: a description of every picture of COCO's split, or of those in a file `questions` of {image_id, question}.

    The references are the objects in the picture: those that are outlined and those that its captions name.
    """

    files = {
        "instances": "annotations/instances_{split}.json",
        "captions": "annotations/captions_{split}.json",
        "questions": "",
    }
    images = COCO_IMAGES
    values = COCO_NAMES | {"question": "Please describe this image in detail."}

    def read(self, source: Source) -> list[Question]:
        there = _objects(source)
        if source.has("questions"):
            return source.made(source.unread("questions"), lambda row: _description(source, row, row.text("question"), there))
        rows = (Row({"image_id": number}, f"picture {number}") for number in there)
        return [_description(source, row, source.value("question"), there) for row in rows]


def _objects(source: Source) -> dict[int, set[str]]:
    """COCO's objects in each picture of the split."""
    kinds = {row.integer("id"): coco_object(row.text("name")) for row in source.rows("instances", "categories")}
    there: dict[int, set[str]] = {row.integer("id"): set() for row in source.rows("instances", "images")}
    for row in source.rows("instances", "annotations"):
        if row.integer("category_id") not in kinds:
            raise row.wrong("category_id", "the id of a category of the file")
        _of_picture(there, row).add(kinds[row.integer("category_id")])
    for row in source.rows("captions", "annotations"):
        _of_picture(there, row).update(mentions(row.text("caption")))
    return there


def _of_picture(there: dict[int, set[str]], row: Row) -> set[str]:
    if row.integer("image_id") not in there:
        raise row.wrong("image_id", "the id of a picture of the split")
    return there[row.integer("image_id")]


def _description(source: Source, row: Row, question: str, there: dict[int, set[str]]) -> Question:
    references = tuple(sorted(_of_picture(there, row))) or (NO_OBJECT,)
    return free_question(row.identifier("image_id"), references, question=question, images=(coco_image(source, row),))
