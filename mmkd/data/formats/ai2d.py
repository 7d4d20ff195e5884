"""AI2D (Kembhavi et al. 2016): diagrams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmkd.data.annotations import Row, load, read_text, shown
from mmkd.data.formats import Format
from mmkd.data.reading import choice_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register


@register("formats", "ai2d")
class AI2D(Format):
    """AI2D: a JSON file for each diagram in `questions`, and the list `ids` of the split's diagrams."""

    files = {"questions": "ai2d/questions", "ids": "ai2d_{split}_ids.csv"}
    images = {"images": "ai2d/images", "abc_images": "ai2d/abcImages"}

    def read(self, source: Source) -> list[Question]:
        return [question for path in _diagrams(source) for question in _diagram(source, path)]

    def paths(self, source: Source) -> list[Path]:
        return [source.path("ids"), *_diagrams(source)]


def _diagrams(source: Source) -> list[Path]:
    """The files of the split's diagrams; a few of the list have none."""
    folder, ids = source.folder("questions"), source.path("ids")
    names = [line.strip() for line in read_text(ids).split("\n") if line.strip()]
    wrong = next((name for name in names if not name.isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{ids}: {shown(wrong)} is no number of a picture")
    return [path for name in names if (path := folder / f"{name}.png.json").exists()]


def _diagram(source: Source, path: Path) -> Iterator[Question]:
    asked = Row(Row(load(path), str(path)).get("questions"), f"{path} questions")
    for text in asked.value:
        row = Row(asked.value[text], f"{path} {shown(text)}")
        # Where a question is about labels, they are replaced by letters in a picture of their own.
        lettered = row.value.get("abcLabel") is True
        image = source.image(path.stem, where=row.where, key="abc_images" if lettered else "images")
        fields = {"question": text, "images": (image,), "categories": {"labels": "letters" if lettered else "text"}}
        answer = row.integer("correctAnswer")
        yield choice_question(row, row.identifier("questionId"), row.texts("answerTexts"), answer, **fields)
