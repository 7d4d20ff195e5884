"""Answers that are programs which draw: they are run in a sandbox, and what they draw is compared with the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from mmkd.errors import ImageError, SampleError
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check, Surroundings
from mmkd.writing.checks.program import may_run, program_in, run_within
from mmkd.writing.drawing import PRELUDE, DrawingError, drawing_of, likeness


@register("checks", "drawing")
@dataclass
class Drawn(Check):
    """Python programs that draw the row's picture (CodePercept); the row's `told.trace` then says what they drew.

    allow: must be true; what a model wrote is executed, as by `program`.  code: as of `program`.  at_least, at_most: likeness
    to the row's first picture, 1 for the same, 0 for an empty sheet in its median colour; without both it needs no picture.
    picture: `drawn` puts what the program drew in the place of the row's pictures.  seconds, memory_mb, output_bytes: its
    limits.
    """

    allow: bool = False
    code: str = ""
    at_least: Annotated[float, Field(le=1)] | None = 0.8
    at_most: Annotated[float, Field(le=1)] | None = None
    picture: Literal["own", "drawn"] = "own"
    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    memory_mb: Annotated[int, Field(ge=64, le=2**16)] = 256
    output_bytes: Annotated[int, Field(ge=1024, le=2**24)] = 2**18

    def __post_init__(self) -> None:
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least is {self.at_least}, above at_most {self.at_most}")

    def prepare(self, around: Surroundings) -> None:
        may_run("drawing", self.allow)

    def refuse(self, one: Candidate) -> str | None:
        source = program_in(one, self.code)
        if source is None:
            return "no program"
        ended, why = run_within(self, f"{PRELUDE}{source}")
        if why:
            return why
        try:
            drawn = drawing_of(ended.output)
        except DrawingError as error:
            return str(error)
        if why := self._unlike(one, drawn.load()):
            return why
        one.row["told"] = {**one.row["told"], "trace": drawn.facts()}
        if self.picture == "drawn":
            one.pictures = (drawn,)
        return None

    def _unlike(self, one: Candidate, drawn: Image.Image) -> str | None:
        if self.at_least is None and self.at_most is None:
            return None
        if not one.pictures:
            return "no picture to compare with"
        try:
            found = likeness(one.pictures[0].load(), drawn)
        except (ImageError, SampleError):
            return "its picture cannot be read"
        one.notes["likeness"] = round(found, 4)
        if self.at_least is not None and found < self.at_least:
            return "draws another picture"
        return "draws the same picture" if self.at_most is not None and found > self.at_most else None
