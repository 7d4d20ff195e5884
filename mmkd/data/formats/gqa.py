"""GQA (Hudson and Manning 2019)."""

from __future__ import annotations

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "gqa")
class GQA(Format):
    """GQA: {split}_questions.json, an object of questions by id."""

    files = {"questions": "{split}_questions.json"}
    images = {"images": "images"}

    def read(self, source: Source) -> list[Question]:
        rows = source.objects("questions")
        named = {row.where: name for name, row in rows.items()}
        return source.made(rows.values(), lambda row: _question(source, named[row.where], row))


def _question(source: Source, name: str, row: Row) -> Question:
    types = Row(row.get("types"), f"{row.where} types") if row.has("types") else None
    return free_question(
        name,
        (row.text("answer"),) if row.has("answer") else (),
        question=row.text("question"),
        images=(source.image(f"{row.identifier('imageId')}.jpg", where=row.where),),
        categories={key: types.text(key) for key in ("structural", "semantic") if types and types.has(key)},
    )
