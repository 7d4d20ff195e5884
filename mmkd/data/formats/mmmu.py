"""MMMU (Yue et al. 2024)."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import choice_question, free_question, letter_index
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source, table
from mmkd.registry import register


@register("formats", "mmmu")
class MMMU(Format):
    """MMMU: {subject}/{split}-*.parquet, which hold the pictures too."""

    files = {"annotations": "*/{split}-*.parquet"}

    def read(self, source: Source) -> list[Question]:
        parts = [source.made(_rows(path), partial(_question, path)) for path in source.paths("annotations")]
        return [question for part in parts for question in part]


def _rows(path: Path) -> list[Row]:
    return [Row(values, f"{path} row {number}", number=number) for number, values in enumerate(table(path))]


def _question(path: Path, row: Row) -> Question:
    question, choices = row.text("question"), _literal_list(row, "options")
    there = [n for n in range(1, 8) if row.has(f"image_{n}")]
    named = {int(n) for n in re.findall(r"<image (\d)>", " ".join([question, *choices]))}
    images = tuple(ImageRef(path, f"{row.number}/image_{n}") for n in there if n in named or not named)
    fields = {"question": question, "images": images, "categories": {"subject": path.parent.name}}
    if row.text("question_type") == "multiple-choice":
        hidden = row.text("answer") == "?"  # the test split
        answer = None if hidden else letter_index(row, "answer")
        return choice_question(row, row.text("id"), choices, answer, **fields)
    answer = row.text("answer")
    several = answer.startswith("[")
    return free_question(row.text("id"), tuple(_literal_list(row, "answer")) if several else (answer,), **fields)


def _literal_list(row: Row, key: str) -> list[str]:
    """A list of strings, written as Python writes it."""
    try:
        value = ast.literal_eval(row.text(key))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise row.wrong(key, "a list in Python's notation") from error
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise row.wrong(key, "a list of strings in Python's notation")
    return value
