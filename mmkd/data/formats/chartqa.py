"""ChartQA (Masry et al. 2022)."""

from __future__ import annotations

from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "chartqa")
class ChartQA(Format):
    """ChartQA: {split}_human.json and {split}_augmented.json, lists of {imgname, query, label}."""

    files = {"human": "{split}/{split}_human.json", "augmented": "{split}/{split}_augmented.json"}
    images = {"images": "{split}/png"}

    def read(self, source: Source) -> list[Question]:
        return [q for part in self.files for q in source.made(source.unread(part), partial(_question, source, part))]


def _question(source: Source, part: str, row: Row) -> Question:
    return free_question(
        f"{part}-{row.number}",
        (row.text("label"),),
        question=row.text("query"),
        images=(source.image(row.text("imgname"), where=row.where),),
        categories={"part": part},
    )
