"""Parts of pictures: crops for the author, a frame on the whole for the student."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from mmkd.data.samples import Question
from mmkd.errors import DataError, SampleError
from mmkd.teachers.view import Crop

Box = tuple[float, float, float, float]
RED = (255, 0, 0)


@dataclass(frozen=True)
class Region:
    """A part of a picture. box: left, top, right, bottom, in pixels or, if none is above 1, in shares."""

    label: str
    box: Box


def regions_of(question: Question, key: str) -> list[Region]:
    """The regions that the data tell of a question: a box "left, top, right, bottom", or a JSON list of {"label", "box"} with
    boxes of four numbers. Raises DataError."""
    text = question.told.get(key, "").strip()
    if not text:
        return []
    if not text.startswith("["):
        return [Region("", _box(question, text.replace(",", " ").split()))]
    try:
        entries = json.loads(text)
        return [Region(str(entry.get("label", "")), _box(question, entry["box"])) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f'question {question.id!r}: told.{key} is no list of {{"label", "box"}} ({error})') from error


def _box(question: Question, values: Any) -> Box:
    try:
        left, top, right, bottom = (float(value) for value in values)
    except (ValueError, TypeError) as error:
        raise DataError(f"question {question.id!r}: {values!r} is no box; write left, top, right, bottom") from error
    if not (all(map(math.isfinite, (left, top, right, bottom))) and left < right and top < bottom):
        raise DataError(f"question {question.id!r}: the box {values!r} has no inside")
    return left, top, right, bottom


@dataclass(frozen=True)
class Boxed:
    """A whole picture with a red frame around a part of it, which is `margin` larger on each side."""

    whole: Any
    box: Box
    margin: float
    line: int

    @property
    def key(self) -> str:
        return f"{self.whole.key} framed {self.box} {self.margin} {self.line}"

    def exists(self) -> bool:
        return self.whole.exists()

    def load(self) -> Image.Image:
        """Raises ImageError where the picture cannot be read, SampleError for a box outside of it."""
        picture = self.whole.load().copy()
        left, top, right, bottom = _pixels(self.box, picture.size)
        if left >= picture.width or top >= picture.height or right <= 0 or bottom <= 0:
            raise SampleError(f"the box {self.box} has no pixel of {self.whole.key} ({picture.width} x {picture.height})")
        wide, high = self.margin * (right - left), self.margin * (bottom - top)
        frame = (
            max(0, left - wide), max(0, top - high), min(picture.width - 1, right + wide), min(picture.height - 1, bottom + high),
        )  # fmt: skip
        ImageDraw.Draw(picture).rectangle([round(value) for value in frame], outline=RED, width=self.line)
        return picture


def _pixels(box: Box, size: tuple[int, int]) -> Box:
    by = size * 2 if max(box) <= 1 else (1, 1, 1, 1)
    return tuple(value * scale for value, scale in zip(box, by, strict=True))  # type: ignore[return-value]


def shown(pictures: tuple[Any, ...], how: str, region: Region | None, margin: float, line: int) -> tuple[Any, ...]:
    """A sample's pictures as a card shows them. Raises SampleError where they lack a region."""
    if how in ("whole", "none") or not pictures:
        return pictures if how == "whole" else ()
    if region is None:
        raise SampleError(f"it has no region, and its picture is to be shown as {how!r}")
    first, *others = pictures
    part = Crop(first, region.box) if how == "crop" else Boxed(first, region.box, margin, line)
    return (part, *others)


def without(pictures: tuple[Any, ...], number: int | None) -> tuple[Any, ...]:
    """All but the `number`th. Raises SampleError where so many are not there, or none would be left."""
    if number is None:
        return pictures
    if len(pictures) < max(2, number):
        raise SampleError(f"its picture {number} is to be left out, and it has {len(pictures)}")
    return pictures[: number - 1] + pictures[number:]
