"""MATH-Vision (Wang et al. 2024)."""

from __future__ import annotations

import re
from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.prompts import letter_of
from mmkd.data.reading import free_question, letter_index
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_BOXED = (
    'Please solve the problem and put your answer in one "\\boxed{}". '
    'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'
)


@register("formats", "math_vision")
class MathVision(Format):
    """MATH-Vision: {split}.jsonl; free answers, and options of which the letter or the words are right."""

    files = {"annotations": "{split}.jsonl"}
    images = {"images": "."}

    def read(self, source: Source) -> list[Question]:
        return source.made(source.unread(), partial(_question, source))


def _question(source: Source, row: Row) -> Question:
    options, answer = row.texts("options"), row.text("answer")
    references = (answer,)
    if options:
        index = letter_index(row, "answer")
        if index >= len(options):
            raise DataError(f"{row.where}: the answer is {answer}, there are {len(options)} options")
        references = (answer, options[index])
    lines = [_BOXED, re.sub(r"\s*<image\d>", "", row.text("question"))]
    lines += [f"({letter_of(place)}) {option}" for place, option in enumerate(options)]
    return free_question(
        row.identifier("id"),
        references,
        question="\n".join(lines),
        choices=tuple(options),
        images=(source.image(row.text("image"), where=row.where),),
        categories={key: row.identifier(key) for key in ("subject", "level") if row.has(key)},
    )
