"""What results.json holds, checked when it is read: the file may have been cut short, edited, or written by something else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmkd.data.annotations import shown
from mmkd.errors import DataError
from mmkd.evaluation.compare import read_object

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
    score_lenient: Share | None = None
    parameters: dict[str, Bytes] = {}
    seconds: Positive = 0.0
    model_fingerprint: str = ""
    by: dict[str, dict[str, Group]] = {}
    also: dict[str, Group] = {}
    versions: dict[str, str] = {}
    efficiency: Efficiency = Efficiency()
    importance: Importance | None = None


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
