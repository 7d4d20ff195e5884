"""Answers on disk while a benchmark is asked, and what a finished evaluation left behind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from mmkd.base.files import write_whole
from mmkd.base.jsonl import JsonLines
from mmkd.data.annotations import one_line, shown
from mmkd.errors import DataError
from mmkd.evaluation.processes import Processes
from mmkd.evaluation.results import read_object, read_predictions

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
PARTIAL = "answers.partial.jsonl"

# Half a surrogate pair, which annotation files do hold, cannot be UTF-8; as "\\udXXX" it is JSON again.
LONE_SURROGATES = "backslashreplace"

log = logging.getLogger(__name__)


class Store:
    """Answers by id, kept on disk batch by batch below a header that says whose they are; one file a process.

    before: those of an interrupted or finished evaluation.  What is added is on the disk alone, so that memory stays flat however
    many questions there are; `answers` reads it again at the end.
    """

    def __init__(self, out: Path, header: dict[str, Any], resume: bool, processes: Processes) -> None:
        self.out, self.header = out, header
        self.lines = JsonLines(out / _partial_name(processes.index), errors=LONE_SURROGATES, durable=True)
        self.before: dict[str, dict] = {}
        if resume:
            self.before = self._kept() or _finished_answers(out, header)
        elif processes.is_first:
            self.close()
        processes.wait()  # everyone has read all files before anyone writes
        self._begin()

    def add(self, answers: dict[str, dict], seconds: float) -> None:
        share = seconds / len(answers)
        self.lines.append({"id": name, **answer, "seconds": share} for name, answer in answers.items())

    def answers(self) -> dict[str, dict]:
        """All that this process knows: what was there before, and what it has added."""
        return self.before | self._read(self.lines.path)

    def close(self) -> None:
        """Removes the files of all processes."""
        for path in self.out.glob(_partial_name("*")):
            path.unlink(missing_ok=True)
        (self.out / PARTIAL).unlink(missing_ok=True)

    def _begin(self) -> None:
        """This process's file with its header, and without a last line that an interruption has cut short."""
        self.lines.drop_torn_line()
        if not self.lines.whole():
            self.lines.append([{"header": self.header}])

    def _kept(self) -> dict[str, dict]:
        """The answers of an interrupted evaluation, whatever the number of its processes."""
        paths = [self.out / PARTIAL, *sorted(self.out.glob(_partial_name("*")))]
        found: dict[str, dict] = {}
        for path in paths:
            if own := self._read(path):
                log.info("going on with %d answers of %s", len(own), path)
            found |= own
        return found

    def _read(self, path: Path) -> dict[str, dict]:
        """The answers in one process's file."""
        lines = JsonLines(path)
        if not lines.whole():
            return {}
        try:
            header, *rows = lines.rows()
            answers = {row["id"]: row for row in map(_checked_answer, rows)}
            difference = _difference(dict(header["header"]), self.header)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({one_line(error) or type(error).__name__}); delete it or start anew with resume=False"
            ) from error
        if difference:
            raise DataError(
                f"{path} holds answers of another evaluation ({difference}); finish that one, "
                "choose another output folder, or start anew with resume=False"
            )
        return answers


def _partial_name(index: int | str) -> str:
    """The file of a process: PARTIAL of the first, with a number of the others."""
    return PARTIAL if index == 0 else PARTIAL.replace(".jsonl", f".{index}.jsonl")


def _checked_answer(row: dict[str, Any]) -> dict[str, Any]:
    """One kept answer. Raises KeyError, TypeError or ValueError for anything else."""
    texts = [row["id"], *(row[key] for key in ("prediction", "skipped") if row[key] is not None)]
    if not all(isinstance(text, str) for text in texts) or (row["prediction"] is None) == (row["skipped"] is None):
        raise TypeError("an answer has an id and either a prediction or a reason to skip it")
    if not math.isfinite(row["seconds"]):
        raise ValueError(f"{row['seconds']} seconds")
    return row


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in now if there.get(key) != now[key]]
    return "; ".join(f"{key}: {shown(there.get(key))} there, {shown(now[key])} now" for key in keys)


def _finished_answers(out: Path, header: dict[str, Any]) -> dict[str, dict]:
    """The answers of a finished evaluation of the same things, without the questions that were skipped."""
    try:
        results = read_object(out / RESULTS)
        rows = read_predictions(out / PREDICTIONS)
        difference = _difference(results, header)
        if difference:
            log.warning("%s is of another evaluation (%s) and will be replaced", out / RESULTS, difference)
            return {}
        answered = [row for row in rows.values() if not row["skipped"]]
        share = float(results["seconds"]) / max(1, len(answered))
        found = [{"id": row["id"], "prediction": row["prediction"], "skipped": None, "seconds": share} for row in answered]
        for row, answer in zip(answered, found, strict=True):
            answer |= {"likelihood": row["likelihood"]} if "likelihood" in row else {}
        return {row["id"]: row for row in map(_checked_answer, found)}
    except (ValueError, KeyError, TypeError):
        return {}  # none there, or not whole: it is answered again and written anew


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    write_whole(path, text, errors=LONE_SURROGATES)
