"""MMBench (Liu et al. 2024), English and Chinese."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from mmkd.data.annotations import Row, shown
from mmkd.data.formats import Format
from mmkd.data.reading import LETTERS, choice_question, letter_index
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source, table
from mmkd.errors import DataError
from mmkd.registry import register

CIRCLE = 1_000_000  # rotations of question n have the indices n + k * this
_SHORTEST_PICTURE = 64  # shorter cells of the picture column are the index of the row that holds it


@register("formats", "mmbench")
class MMBench(Format):
    """MMBench: mmbench_{split}.tsv, pictures in base64, a column a choice; the category `circle` joins orders of choices."""

    files = {"annotations": "mmbench_{split}.tsv"}

    def read(self, source: Source) -> list[Question]:
        path = source.path()
        rows = table(path)
        place = _picture_rows(rows, path)
        found = (Row(row, f"{path} row {n}", number=n) for n, row in enumerate(rows))
        return source.made(found, lambda row: _question(path, row, place[row.number]))


def _picture_rows(rows: tuple[dict[str, Any], ...], path: Path) -> list[int]:
    """The row whose cell holds each row's picture: the first with the same content, so that it is seen once."""
    first: dict[str, int] = {}
    by_index = {row.get("index", ""): number for number, row in enumerate(rows)}
    found = []
    for number, row in enumerate(rows):
        cell = row.get("image", "")
        if not cell or (len(cell) <= _SHORTEST_PICTURE and cell not in by_index):
            raise DataError(f"{path} row {number}: column 'image' is {shown(cell)}, neither base64 nor another row's index")
        other = by_index[cell] if len(cell) <= _SHORTEST_PICTURE else number
        found.append(first.setdefault(rows[other].get("image", ""), other))
    return found


def _question(path: Path, row: Row, picture: int) -> Question:
    index = row.text("index")
    if not index.isdecimal():
        raise row.wrong("index", "a whole number")
    choices = _choices(row)
    hint = row.text("hint", default="")
    categories = {key: row.text(key) for key in ("category", "l2-category") if not _is_none(row.text(key, default=""))}
    return choice_question(
        row,
        index,
        choices,
        letter_index(row, "answer") if not _is_none(row.text("answer", default="")) else None,
        question=row.text("question") if _is_none(hint) else f"{hint}\n{row.text('question')}",
        images=(ImageRef(path, f"{picture}/image"),),
        categories=categories | {"circle": str(int(index) % CIRCLE)},
    )


def _choices(row: Row) -> list[str]:
    """The cells up to the last that is not empty; "None", "nan" and "NA" are words like others. Raises DataError for a gap."""
    choices = [row.text(letter) for letter in takewhile(row.has, LETTERS)]
    while choices and not choices[-1].strip():
        choices.pop()
    gap = next((LETTERS[place] for place, choice in enumerate(choices) if not choice.strip()), None)
    if gap:
        raise DataError(
            f"{row.where}: choice {gap} is empty, choice {LETTERS[len(choices) - 1]} is not; "
            "a program that takes the words None or NA for empty cells may have written the file"
        )
    return choices


def _is_none(text: str) -> bool:
    """An empty cell of hint, answer or category, or what pandas writes for one."""
    return text.strip().lower() in ("", "nan", "none")
