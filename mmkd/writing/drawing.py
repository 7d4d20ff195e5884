"""Pictures as programs: a few drawing functions for a program in the sandbox, and the picture and the facts of what it drew.

The program runs apart (`mmkd.base.sandbox`) and only prints a list of shapes. The list is looked at value by value and drawn
here, so that nothing of the program but numbers, colours and short words comes out of the sandbox.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

# What stands before every program. A prompt card tells a model of these functions.
PRELUDE = """\
import atexit as _atexit, json as _json
_drawn = []
def canvas(width, height, colour="white"): _drawn.append(["canvas", [width, height], colour])
def rectangle(left, top, right, bottom, colour="black"): _drawn.append(["rectangle", [left, top, right, bottom], colour])
def ellipse(left, top, right, bottom, colour="black"): _drawn.append(["ellipse", [left, top, right, bottom], colour])
def line(x1, y1, x2, y2, colour="black", width=1): _drawn.append(["line", [x1, y1, x2, y2, width], colour])
def polygon(points, colour="black"): _drawn.append(["polygon", [v for point in points for v in point], colour])
def text(x, y, words, colour="black", size=12): _drawn.append(["text", [x, y, size], colour, str(words)])
_atexit.register(lambda: print("\\n" + _json.dumps(_drawn)))
"""
SHAPES = {"canvas": 2, "rectangle": 4, "ellipse": 4, "line": 5, "polygon": None, "text": 3}  # numbers of each
MOST, POINTS, FURTHEST = 2000, 200, 4096  # shapes of a picture, points of a polygon, pixels from the corner
SIDES = (8, 1024)  # pixels
COMPARED = 256  # pixels a side, at most, in which two pictures are compared
_TEXT = re.compile(r"[\w .,:;%+\-/()=°'$?!]{1,40}")


class DrawingError(ValueError):
    """Why what a program printed is no drawing; it is counted, so it names no content."""


@dataclass(frozen=True)
class Shape:
    kind: str
    numbers: tuple[float, ...]
    colour: str
    words: str = ""


@dataclass(frozen=True)
class Drawing:
    """A picture that a program drew. The first shape is its canvas. A `mmkd.towers.samples.Picture`."""

    shapes: tuple[Shape, ...]

    @cached_property
    def key(self) -> str:
        return "drawn " + hashlib.blake2b(repr(self.shapes).encode(), digest_size=16).hexdigest()

    @property
    def name(self) -> str:
        return self.key

    file: Any = None  # it is in none

    def exists(self) -> bool:
        return True

    def read_bytes(self) -> bytes:
        return self.load().tobytes()

    def load(self) -> Image.Image:
        """The picture in RGB."""
        width, height = map(round, self.shapes[0].numbers)
        picture = Image.new("RGB", (width, height), self.shapes[0].colour)
        pen = ImageDraw.Draw(picture)
        for shape in self.shapes[1:]:
            _draw(pen, shape)
        return picture

    def facts(self) -> str:
        """What was drawn, one shape a line, and how many of each kind and colour."""
        canvas, *shapes = self.shapes
        lines = [f"canvas {_listed(canvas.numbers)} {canvas.colour}"]
        lines += [
            f"{one.kind} {one.colour} at {_listed(one.numbers)}" + (f" {one.words!r}" if one.words else "") for one in shapes
        ]
        counts = Counter(one.kind for one in shapes) + Counter(f"{one.colour} {one.kind}" for one in shapes)
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        return "\n".join([*lines, f"in all {len(shapes)} shapes" + (f": {told}" if told else "")])


def drawing_of(printed: str) -> Drawing:
    """The drawing that the last line of a program's output lists. Raises DrawingError."""
    lines = printed.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found:
        raise DrawingError("draws nothing")
    if len(found) > MOST:
        raise DrawingError(f"draws more than {MOST} shapes")
    shapes = tuple(map(_shape, found))
    if [shape.kind for shape in shapes].count("canvas") != 1 or shapes[0].kind != "canvas":
        raise DrawingError("has no canvas, or several")
    if not all(SIDES[0] <= side <= SIDES[1] for side in shapes[0].numbers):
        raise DrawingError(f"has a canvas of no {SIDES[0]} to {SIDES[1]} pixels a side")
    if len(shapes) == 1:
        raise DrawingError("draws nothing")
    return Drawing(shapes)


def _shape(entry: Any) -> Shape:
    """A shape of checked values. Raises DrawingError."""
    if not isinstance(entry, list) or len(entry) not in (3, 4) or not isinstance(entry[1], list):
        raise DrawingError("draws what is no shape")
    kind, numbers, colour, *words = entry
    if not isinstance(kind, str) or kind not in SHAPES or bool(words) != (kind == "text"):
        raise DrawingError("draws what is no shape")
    count = SHAPES[kind]
    fits = len(numbers) == count if count is not None else 6 <= len(numbers) <= 2 * POINTS and len(numbers) % 2 == 0
    if not fits or not all(map(_is_place, numbers)):
        raise DrawingError("draws with what is no place")
    if not isinstance(colour, str) or len(colour) > 30:
        raise DrawingError("draws in what is no colour")
    try:
        if len(ImageColor.getrgb(colour)) != 3:
            raise ValueError(colour)
    except ValueError:
        raise DrawingError("draws in what is no colour") from None
    if words and not (isinstance(words[0], str) and _TEXT.fullmatch(words[0])):
        raise DrawingError("draws what is no short text")
    return Shape(kind, tuple(map(float, numbers)), colour.casefold(), *words)


def _is_place(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FURTHEST  # false for NaN


def _draw(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    numbers = shape.numbers
    if shape.kind in ("rectangle", "ellipse"):
        (left, right), (top, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
        (pen.rectangle if shape.kind == "rectangle" else pen.ellipse)((left, top, right, bottom), fill=shape.colour)
    elif shape.kind == "line":
        pen.line(numbers[:4], fill=shape.colour, width=max(1, round(min(numbers[4], 100))))
    elif shape.kind == "polygon":
        pen.polygon(numbers, fill=shape.colour)
    else:
        font = ImageFont.load_default(min(max(numbers[2], 6), 128))
        pen.text(numbers[:2], shape.words, fill=shape.colour, font=font)


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{round(value, 2):g}" for value in numbers)


def likeness(own: Image.Image, drawn: Image.Image) -> float:
    """How much of a picture another shows: 1 for the same, 0 for an empty sheet in its median colour, less for what is worse.

    1 - |own - drawn| / |own - median|, sums over pixels and colours, in the size of `own`, at most `COMPARED` a side.
    """
    scale = min(1.0, COMPARED / max(own.size))
    size = tuple(max(1, round(side * scale)) for side in own.size)
    first, second = (np.asarray(one.convert("RGB").resize(size, Image.Resampling.BILINEAR), float) for one in (own, drawn))
    empty = np.abs(first - np.median(first, axis=(0, 1))).sum()
    apart = np.abs(first - second).sum()
    return 1.0 - float(apart / empty) if empty else float(apart == 0) if math.isfinite(apart) else 0.0
