"""Files for the test servers that alone know a split's answers.

Every question gets a row; one that could not be asked gets the empty answer. For whatever a server expects beyond the file
(names, archives) see its own pages. The servers' formats stand with their benchmarks, in `mmkd.evaluation.tasks`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.base.files import write_whole
from mmkd.data.samples import Question
from mmkd.registry import Registry

Predictions = Mapping[str, str]  # raw texts by id
SUBMISSIONS = Registry("submissions", "mmkd.evaluation.tasks")


class Submission:
    """A server's file: JSON with a row a question."""

    file = "submission.json"

    def row(self, prediction: str, question: Question) -> Any:
        raise NotImplementedError(f"{type(self).__qualname__} lacks `row`")

    def write(self, folder: Path, predictions: Predictions, questions: Sequence[Question]) -> None:
        """Writes `file` to `folder`."""
        rows = [self.row(predictions.get(question.id, ""), question) for question in questions]
        write_whole(folder / self.file, json.dumps(rows, ensure_ascii=False), errors="backslashreplace")


def submission(name: str) -> Callable[[type[Submission]], type[Submission]]:
    """A decorator that registers a server's file under the name by which cards have it."""

    def keep(found: type[Submission]) -> type[Submission]:
        SUBMISSIONS.add(name, found)
        return found

    return keep


def number(name: str) -> int | str:
    """Ids are whole numbers in the servers' files wherever they were so in the questions."""
    return int(name) if name.isdecimal() else name
