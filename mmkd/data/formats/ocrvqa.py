"""OCR-VQA (Mishra et al. 2019): covers of books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_SPLITS = {"train": 1, "val": 2, "test": 3}


@register("formats", "ocrvqa")
class OCRVQA(Format):
    """OCR-VQA: dataset.json with the books of all splits."""

    files = {"annotations": "dataset.json"}
    images = {"images": "images"}

    def read(self, source: Source) -> list[Question]:
        if source.split not in _SPLITS:
            raise DataError(f"OCR-VQA has no split {source.split!r}; there are {', '.join(_SPLITS)}")
        books = source.objects()
        named = {row.where: name for name, row in books.items()}
        wanted = _SPLITS[source.split]
        chosen = (row for row in books.values() if row.integer("split") == wanted)
        of_books = source.made(chosen, lambda row: list(_book(source, named[row.where], row)))
        return [question for questions in of_books for question in questions]


def _book(source: Source, name: str, row: Row) -> Iterator[Question]:
    questions, answers = row.texts("questions"), row.texts("answers")
    if len(questions) != len(answers):
        raise DataError(f"{row.where}: {len(questions)} questions and {len(answers)} answers")
    # The authors' download script names a picture by its id and the ending of its address.
    image = source.image(name + PurePosixPath(row.text("imageURL")).suffix, where=row.where)
    genre = {"genre": row.text("genre")} if row.has("genre") else {}
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield free_question(f"{name}-{number}", (answer,), question=question, images=(image,), categories=genre)
