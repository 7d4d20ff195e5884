"""SEED-Bench (Li et al. 2023)."""

from __future__ import annotations

from itertools import takewhile

from mmkd.data.annotations import Row, load
from mmkd.data.formats import Format
from mmkd.data.reading import LETTERS, choice_question, letter_index
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "seed")
class Seed(Format):
    """SEED-Bench's questions on single images; those on videos are left out."""

    files = {"annotations": "SEED-Bench.json"}
    images = {"images": "SEED-Bench-image"}

    def read(self, source: Source) -> list[Question]:
        path = source.path()
        content = Row(load(path), str(path))
        types = Row(content.get("question_type"), f"{path} question_type") if content.has("question_type") else None
        kinds = {str(number): name for name, number in types.value.items()} if types else {}
        rows = (row for row in source.rows("annotations", "questions") if row.text("data_type") == "image")
        return source.made(rows, lambda row: _question(source, row, kinds))


def _question(source: Source, row: Row, kinds: dict[str, str]) -> Question:
    choices = [row.text(key) for key in takewhile(row.has, (f"choice_{letter.lower()}" for letter in LETTERS))]
    number = row.identifier("question_type_id") if row.has("question_type_id") else ""
    fields = {
        "question": row.text("question"),
        "images": (source.image(row.text("data_id"), where=row.where),),
        "categories": {"kind": kinds.get(number, number)} if number else {},
    }
    return choice_question(row, row.identifier("question_id"), choices, letter_index(row, "answer"), **fields)
