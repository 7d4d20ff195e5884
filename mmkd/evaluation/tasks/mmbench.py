"""MMBench: the circular score, and the server's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question
from mmkd.evaluation.metric import aggregate_of_format
from mmkd.evaluation.spreadsheet import write_spreadsheet
from mmkd.evaluation.submission import Predictions, Submission, number, submission

_FEWEST = 4  # columns of choices in the authors' table


@aggregate_of_format("mmbench")
def mmbench_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MMBench's circular score: a question is right when it is right in every order of its choices that was asked."""
    circles: dict[str, list[float]] = {}
    for row in rows:
        circles.setdefault(row["categories"]["circle"], []).append(row["score"])
    right = [min(scores) for scores in circles.values()]
    return {"mmbench": {"circular": math.fsum(right) / len(right), "questions": len(circles), "rows": len(rows)}}


@submission("mmbench")
class MMBench(Submission):
    """MMBench's table."""

    file = "submission.xlsx"

    def row(self, prediction: str, question: Question, width: int = _FEWEST) -> list[str | int]:
        choices = [*question.choices, *[""] * (width - len(question.choices))]
        answer = "" if question.answer_index is None else letter_of(question.answer_index)
        return [number(question.id), question.question, *choices, answer, prediction]

    def write(self, folder: Path, predictions: Predictions, questions: Sequence[Question]) -> None:
        width = max(_FEWEST, *(len(question.choices) for question in questions))
        columns = ["index", "question", *map(letter_of, range(width)), "answer", "prediction"]
        rows = [self.row(predictions.get(question.id, ""), question, width) for question in questions]
        write_spreadsheet(folder / self.file, columns, rows)
