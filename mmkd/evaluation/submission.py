"""Files for the test servers that alone know a split's answers.

Each format is a function (predictions by id, questions) -> file name and content. Every question gets a row; one that could not
be asked gets the empty answer. For whatever a server expects beyond the file (names, archives) see its own pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question
from mmkd.evaluation.scorers import normalise_evalai
from mmkd.evaluation.spreadsheet import write_spreadsheet

Predictions = Mapping[str, str]


def _number(name: str) -> int | str:
    """Ids are whole numbers in the servers' files wherever they were so in the questions."""
    return int(name) if name.isdecimal() else name


def _vqav2(predictions: Predictions, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """EvalAI's VQA v2 and OK-VQA: answers normalised as LLaVA's converter does."""
    return [
        {"question_id": _number(q.id), "answer": normalise_evalai(predictions.get(q.id, ""))} for q in questions
    ]


def _vizwiz(predictions: Predictions, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """EvalAI's VizWiz: questions go by their picture's name."""
    return [{"image": q.id, "answer": normalise_evalai(predictions.get(q.id, ""))} for q in questions]


def _docvqa(predictions: Predictions, questions: Sequence[Question]) -> list[dict[str, Any]]:
    return [{"questionId": _number(q.id), "answer": predictions.get(q.id, "").strip()} for q in questions]


def _stvqa(predictions: Predictions, questions: Sequence[Question]) -> list[dict[str, Any]]:
    return [{"question_id": _number(q.id), "answer": predictions.get(q.id, "").strip()} for q in questions]


def _mmbench_row(prediction: str, question: Question) -> list[str | int]:
    choices = [*question.choices, *[""] * (4 - len(question.choices))]
    answer = "" if question.answer_index is None else letter_of(question.answer_index)
    return [_number(question.id), question.question, *choices, answer, prediction]


_MMBENCH_COLUMNS = ["index", "question", "A", "B", "C", "D", "answer", "prediction"]

_JSON: dict[str, Callable[[Predictions, Sequence[Question]], list[dict[str, Any]]]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "docvqa": _docvqa,
    "stvqa": _stvqa,
}
SUBMISSIONS = (*_JSON, "mmbench")


def submission_file(format: str) -> str:
    """The name of a format's file."""
    return "submission.xlsx" if format == "mmbench" else "submission.json"


def write_submission(format: str, folder: Path, predictions: Predictions, questions: Sequence[Question]) -> Path:
    """Writes the file of `submission_file` to `folder` and returns its path. `predictions` are raw texts by id."""
    path = folder / submission_file(format)
    if format == "mmbench":
        rows = [_mmbench_row(predictions.get(q.id, ""), q) for q in questions]
        write_spreadsheet(path, _MMBENCH_COLUMNS, rows)
        return path
    content = json.dumps(_JSON[format](predictions, questions), ensure_ascii=False)
    path.write_text(content, encoding="utf-8", errors="backslashreplace")
    return path
