"""easy-VQA (github.com/vzhou842/easy-VQA): drawn shapes."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

from mmkd.data.annotations import Row, as_list, kind, load
from mmkd.data.formats import Format
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_YES_NO = "yes/no"
_THINGS = {
    *("circle", "rectangle", "triangle"),
    *("black", "gray", "red", "blue", "green", "yellow", "teal", "brown"),
}


@register("formats", "easy_vqa")
class EasyVQA(Format):
    """easy-VQA: {split}/questions.json of [question, answer, image id], pictures in {split}/images."""

    files = {"annotations": ("{split}/questions.json", "{split}_questions.json")}
    images = {"images": ("{split}/images/{image_id}.png", "{split}_images.zip/{image_id}.png")}

    def read(self, source: Source) -> list[Question]:
        path = source.path("annotations")
        rows = [partial(_row, entry, f"{path} entry {n}", n) for n, entry in enumerate(as_list(path, load(path)))]
        return _with_things(source.made(rows, lambda row: _question(source, row, f"{source.split}-{row.number}")))


def _row(entry: Any, where: str, number: int) -> Row:
    if not isinstance(entry, list) or len(entry) != 3:
        raise DataError(f"{where}: {kind(entry)} where [question, answer, image id] is expected")
    return Row(dict(zip(("question", "answer", "image_id"), entry, strict=True)), where, number=number)


def _question(source: Source, row: Row, name: str) -> Question:
    question, answer = row.text("question"), row.text("answer")
    group = _YES_NO if answer in ("yes", "no") else "color" if "color" in question else "shape"
    return Question(
        id=name,
        question=question,
        images=(source.image(where=row.where, image_id=row.identifier("image_id")),),
        answer=answer,
        references=(answer,),
        categories={"kind": group},
        claims=_claims(question) if group == _YES_NO else {},
    )


def _with_things(questions: list[Question]) -> list[Question]:
    """With what the true answers to all questions on a picture say of its one shape."""
    shown: dict[ImageRef, dict[str, None]] = {}
    for question in questions:
        is_open = question.categories["kind"] != _YES_NO
        thing = question.answer if is_open else question.claims.get(question.answer)
        shown.setdefault(question.images[0], {}).update({thing: None} if thing else {})
    return [replace(question, shown=tuple(shown[question.images[0]])) for question in questions]


def _claims(question: str) -> dict[str, str]:
    """{answer: the colour or shape that it says is there}, of "is there a red shape?" as of "is no circle present?"."""
    words = re.findall("[a-z]+", question.lower())
    thing = next((word for word in words if word in _THINGS), None)
    return {} if thing is None else {"no" if {"no", "not"} & set(words) else "yes": thing}
