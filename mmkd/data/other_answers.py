"""Answers that take the place of a data set's own, such as a teacher's: a file of JSON lines with `id` and `answer`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmkd.base.jsonl import JsonLines
from mmkd.data.lazy import Lazy
from mmkd.data.samples import Sample
from mmkd.errors import DataError, one_line
from mmkd.towers.samples import Turn

logger = logging.getLogger(__name__)

STAND_IN = "yes"  # for answers that are not there yet, where only their being there matters


def read_answers(path: Path | str) -> dict[str, str]:
    """{id: answer} of a file. Raises DataError."""
    path = Path(path)
    try:
        rows = JsonLines(path).rows()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no answers: {one_line(error)}") from error
    wrong = next((n for n, row in enumerate(rows, start=1) if not _is_answer(row)), None)
    if wrong is not None:
        raise DataError(f'{path}, line {wrong}: {{"id": "...", "answer": "..."}} is expected')
    if not rows:
        raise DataError(f"{path} holds no answers")
    return {row["id"]: row["answer"] for row in rows}


def _is_answer(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("answer"), str)


def answered(sample: Sample, answers: Mapping[str, str]) -> Sample:
    """The sample with another answer. Raises DataError for one that is not there, an empty one, and a talk of several answers."""
    if sample.answers > 1:
        raise DataError(f"it has {sample.answers} answers, and only one can be another's")
    answer = answers.get(sample.id)
    if answer is None:
        raise DataError("the file of answers has none for it")
    if not answer.strip():
        raise DataError("its answer is empty")
    return replace(sample, turns=(*sample.prompt_turns, Turn("assistant", answer)))


def with_answers(samples: Sequence[Sample], answers: Mapping[str, str], name: str) -> Sequence[Sample]:
    """The samples with other answers; those that get none are left out, counted and named in the log. Raises DataError."""
    if isinstance(samples, Lazy):
        return samples.then(partial(answered, answers=answers))
    kept, without = [], []
    for sample in samples:
        try:
            kept.append(answered(sample, answers))
        except DataError as error:
            without.append(f"{sample.id!r} ({error})")
    if without:
        some = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        if not kept:
            raise DataError(f"data {name}: no sample gets an answer: {some}")
        logger.warning("data %s: %d of %d samples get no answer and are left out: %s", name, len(without), len(samples), some)
    return kept
