"""The files of an evaluation, checked when they are read: they may have been cut short, edited, or written by something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmkd.base.jsonl import read_object
from mmkd.data.annotations import Row, one_line, shown
from mmkd.errors import DataError

Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Group(_Part):
    """A score with its 95 % interval over n questions; both None where a test server keeps the answers."""

    n: int = Field(ge=0)
    score: Share | None
    ci95: Annotated[list[Share], Field(min_length=2, max_length=2)] | None


class Efficiency(_Part):
    weight_bytes: Bytes | None = None
    peak_bytes: Bytes | None = None
    tokens_per_second: Positive | None = None
    questions_per_second: Positive | None = None


class Importance(_Part):
    n: int = Field(ge=0)
    needs_image: Share = 0.0
    both: Share = 0.0
    hurt_by_image: Share = 0.0
    neither: Share = 0.0


class Number(_Part):
    value: Annotated[float, Field(allow_inf_nan=False)]
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]


class AfterTemperature(_Part):
    temperature: Positive
    nll: Number
    ece: Number


class Calibration(_Part):
    """See `mmkd.evaluation.calibration.calibration`."""

    n: int = Field(ge=1)
    nll: Number
    ece: Number
    most_confident_third: Number
    aurc: Number
    after_temperature: AfterTemperature
    curve: list[Annotated[list[Share], Field(min_length=2, max_length=2)]]


class Results(_Part):
    """The keys that reports rely on; others may be there."""

    n: int = Field(0, ge=0)
    score: Share | None = None
    ci95: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    title: str = ""
    model: str = ""
    metric: str = "score"
    prompt: str = ""
    n_skipped: int = Field(0, ge=0)
    skipped: dict[str, int] = {}
    unparsed_share: Share = 0.0
    remarks: list[str] = []
    thinking_share: Share = 0.0
    unclosed_thinking_share: Share = 0.0
    score_lenient: Share | None = None
    neither_share: Share | None = None
    parameters: dict[str, Bytes] = {}
    seconds: Positive = 0.0
    model_fingerprint: str = ""
    by: dict[str, dict[str, Group]] = {}
    also: dict[str, Group] = {}
    versions: dict[str, str] = {}
    efficiency: Efficiency = Efficiency()
    importance: Importance | None = None
    calibration: Calibration | None = None


def read_results(path: Path | str) -> dict[str, Any]:
    """The content of a results.json. Raises DataError, on one line, for anything that is none."""
    content = read_object(path)
    try:
        Results.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = shown(".".join(map(str, first["loc"])))
        raise DataError(f"{path}: key {key} is {shown(first['input'])}: {first['msg']}; evaluate again") from error
    return content


def read_predictions(path: Path | str) -> dict[str, dict]:
    """The rows of a predictions.jsonl by id, in order. Raises DataError naming file, line and key."""
    path = Path(path)
    found: dict[str, dict] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"predictions {path} cannot be read: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _checked_row(line, f"{path}, line {number}")
        if row["id"] in found:
            raise DataError(f"{path}, line {number}: id {shown(row['id'])} is there twice; evaluate again")
        found[row["id"]] = row
    return found


_TEXTS = ("question", "prompt", "prediction", "thinking", "answer", "parsed", "group", "skipped")
_TEXT_LISTS = ("references", "images", "choices")


def _checked_row(line: str, where: str) -> dict[str, Any]:
    """One row of predictions whose known keys hold what they should; keys may be missing."""
    try:
        row = Row(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a row of predictions ({one_line(error)}); evaluate again") from error
    row.text("id")
    for key in filter(row.has, _TEXTS):
        row.text(key)
    for key in filter(row.has, _TEXT_LISTS):
        row.texts(key)
    if row.has("categories"):
        groups = Row(row.get("categories"), f"{where} categories")
        for key in groups.value:
            groups.text(key)
    if row.has("likelihood") and not _are_likelihoods(row.value["likelihood"]):
        raise row.wrong("likelihood", "lists of finite numbers by name")
    score = row.value.get("score")
    number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
    if score is not None and not (number and 0 <= score <= 1):
        raise row.wrong("score", "a number from 0 to 1")
    if score is None and row.has("prediction") is False and not row.has("skipped"):
        raise DataError(f"{where}: neither a score, a prediction nor a reason to skip; evaluate again")
    return row.value


def _are_likelihoods(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(values, list) and values for values in value.values()):
        return False
    numbers = [number for values in value.values() for number in values]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


def answer_of(row: Mapping) -> str | None:
    """What was answered, without the thinking before it; None for one that ends within its thinking, and for a row without."""
    return row.get("answer") if row.get("thinking") else row.get("prediction")


def group_of(row: Mapping) -> str:
    """The cluster of a question: its picture (by content, else by name), or the question itself."""
    return row.get("group") or "|".join(row.get("images") or ()) or f"question {row['id']}"


def same_questions(runs: Mapping[str, Mapping[str, dict]]) -> list[str]:
    """The ids that every run holds, in order. Raises DataError with counts and ids where runs differ."""
    names = list(runs)
    for name in names[1:]:
        only_first = [i for i in runs[names[0]] if i not in runs[name]]
        only_other = [i for i in runs[name] if i not in runs[names[0]]]
        if only_first or only_other:
            raise DataError(
                f"{names[0]} and {name} did not answer the same questions: "
                f"{len(only_first)} only in {names[0]} (first {only_first[:3]}), "
                f"{len(only_other)} only in {name} (first {only_other[:3]}); "
                "evaluate both on the same split and limit"
            )
    return list(runs[names[0]])
