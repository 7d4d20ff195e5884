"""What a teacher is opened for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Opening:
    """What the stages ask of one teacher.

    terms: by stage, those that compare with this teacher (`mmkd.terms.term.Term`).  precision: of each stage that reads it.
    """

    name: str
    max_length: int
    terms: Mapping[str, Sequence[Any]]
    precision: Mapping[str, str]
