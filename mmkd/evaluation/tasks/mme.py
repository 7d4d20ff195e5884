"""MME: two questions a picture, and scores of up to 200 a task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.formats.mme import TASKS
from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.metric import Metric
from mmkd.evaluation.results import answer_of
from mmkd.evaluation.tasks.general import exact_match
from mmkd.evaluation.tasks.yes_no import YesNo, neither_share
from mmkd.registry import register


@register("parsers", "mme")
class MMEAnswers(YesNo):
    """MME's own rule; the score by a reader's rule stands beside it."""

    def parse(self, text: str, choices: Sequence[str]) -> str:
        return mme_parse(text)


def mme_parse(text: str) -> str:
    """What MME's own tool finds in the first four characters: "yes", else "no", else "other"; any case."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


@register("metrics", "mme")
class MME(Metric):
    """Accuracy over questions; MME's own scores by task, perception and cognition stand beside it."""

    def score(self, answer: str, question: Question) -> float:
        return exact_match(answer, question.references)

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        return {"mme": mme_numbers(rows), "neither_share": neither_share(rows)}


def mme_numbers(rows: Sequence[Mapping]) -> dict[str, Any]:
    """MME by task, and the sums of perception (at most 2,000), cognition (800) and all.

    A picture whose other question was left out, by a limit or as unreadable, is left out too and counted in "unpaired".
    """
    pairs = Counter(_picture(row) for row in rows)
    whole = [row for row in rows if pairs[_picture(row)] == 2]
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for row in whole:
        task = row["categories"].get("task", "all")
        tasks.setdefault(task, []).append((_picture(row), answer_of(row) or "", row["references"][0]))
    numbers: dict[str, Any] = mme(tasks)
    for part, names in TASKS.items():
        if any(name in tasks for name in names):
            numbers[part] = {"score": math.fsum(numbers[name]["score"] for name in names if name in tasks)}
    return numbers | {"unpaired": len(rows) - len(whole)}


def _picture(row: Mapping) -> str:
    return "|".join(row["images"])


def mme(tasks: Mapping[str, Sequence[tuple[str, str, str]]]) -> dict[str, dict[str, float]]:
    """MME's numbers by task, and their sum under "total".

    `tasks` is {task: [(image key, prediction, label), ...]}: two questions an image, the predictions raw
    (parsed here by `mme_parse`), the labels "yes" or "no".  `acc` is the share of questions, `acc_plus` the
    share of images with both right, `score` = 100 (acc + acc_plus), at most 200 a task; "other" is wrong.
    Raises DataError when an image does not have exactly two questions.
    """
    result = {task: _mme_task(task, rows) for task, rows in tasks.items()}
    return result | {"total": {"score": math.fsum(values["score"] for values in result.values())}}


def _mme_task(task: str, rows: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    by_image: dict[str, list[bool]] = {}
    for image, prediction, label in rows:
        by_image.setdefault(image, []).append(mme_parse(prediction) == label.strip().lower())
    odd = [image for image, right in by_image.items() if len(right) != 2]
    if odd or not rows:
        raise DataError(
            f"mme task {task!r}: needs two questions an image; {len(odd)} images differ, first {odd[:3]}"
        )
    acc = sum(map(sum, by_image.values())) / len(rows)
    acc_plus = sum(map(all, by_image.values())) / len(by_image)
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}
