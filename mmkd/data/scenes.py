"""Drawn scenes for the embedded sample: coloured shapes on a grid and a printed sign, 64 x 64 pixels.

Pixels follow from the scene alone: shapes and letters are drawn from masks made here, not by a font or by a
drawing library, whose results differ between versions.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

IMAGE_SIZE = 64

COLOR_VALUES = {
    "red": (214, 34, 34),
    "green": (28, 138, 52),
    "blue": (36, 72, 214),
    "yellow": (250, 212, 20),
    "purple": (134, 44, 168),
    "orange": (248, 136, 16),
    "black": (16, 16, 16),
    "white": (255, 255, 255),
    "pink": (255, 170, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
OBJECT_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
# As many dark as bright colours: either may be the sign, so sign and letters are both uniform over all eight.
DARK_COLORS = ("red", "green", "blue", "black")
BRIGHT_COLORS = ("white", "yellow", "orange", "pink")
TINTS = ((238, 238, 234), (226, 234, 240), (240, 232, 222), (228, 240, 228), (236, 228, 238))
# Words that annotators can take for one another, and a few that they cannot.
WORDS = ("ball", "bell", "cake", "lake", "goat", "boat", "ship", "shop", "stop", "open", "taxi", "zoo")
NUMBERS = tuple(str(number) for number in range(20))

# Five columns by seven rows, one row a group.
GLYPHS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".#### #.... #.... #.### #...# #...# .####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "0": ".###. #...# #...# #...# #...# #...# .###.",
    "1": "..#.. .##.. #.#.. ..#.. ..#.. ..#.. #####",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "#..#. #..#. #..#. ##### ...#. ...#. ...#.",
    "5": "##### #.... #.... ####. ....# ....# ####.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
}
GLYPH_SCALE = 2
SIGN_HEIGHT = 7 * GLYPH_SCALE + 4


@dataclass(frozen=True)
class Thing:
    """One shape: what and where. `x`, `y` and `size` in pixels, `row` and `column` of its cell."""

    shape: str
    color: str
    row: int
    column: int
    x: int
    y: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Sign:
    text: str
    fill: str
    letters: str
    at_top: bool
    x: int
    y: int

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()

    @property
    def width(self) -> int:
        return len(self.text) * 6 * GLYPH_SCALE - GLYPH_SCALE + 6


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one to three things of one shape and colour, and perhaps a sign."""

    things: tuple[Thing, ...]  # in raster order
    sign: Sign | None
    tint: int
    rows: int

    @property
    def thing(self) -> Thing:
        """Any of the things: they differ in their place only."""
        return self.things[0]

    @property
    def description(self) -> str:
        """What is shown without sizes, offsets and the tint: the content that no two splits share."""
        shown = [f"{t.name} {t.row} {t.column}" for t in self.things]
        if self.sign:
            s = self.sign
            shown.append(f"sign {s.text} {s.fill} {s.letters} {'top' if s.at_top else 'bottom'}")
        return f"{self.rows} rows; " + "; ".join(shown)


def _draw_sign(rng: random.Random) -> Sign:
    text = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(NUMBERS)
    fill, letters = rng.choice(DARK_COLORS), rng.choice(BRIGHT_COLORS)
    if rng.random() < 0.5:
        fill, letters = letters, fill
    at_top = rng.random() < 0.5
    width = Sign(text, fill, letters, at_top, 0, 0).width
    x = rng.randint(1, IMAGE_SIZE - width - 1)
    return Sign(text, fill, letters, at_top, x, 1 if at_top else IMAGE_SIZE - SIGN_HEIGHT - 1)


def draw_scene(rng: random.Random, sign_probability: float) -> Scene:
    """A random scene: one to three things alike and, with the given probability, a sign.

    Several kinds of things in one picture were tried: then a question names one of them, and a model of a million
    parameters did not learn to look it up within half an hour on two cores.
    """
    sign = _draw_sign(rng) if rng.random() < sign_probability else None
    shape, color, count = rng.choice(SHAPES), rng.choice(OBJECT_COLORS), rng.randint(1, 3)
    rows = 2 if sign else 3
    top = SIGN_HEIGHT + 2 if sign and sign.at_top else 0
    cell_height = (IMAGE_SIZE - SIGN_HEIGHT - 2) // 2 if sign else IMAGE_SIZE // 3
    cell_width = IMAGE_SIZE // 3
    cells = sorted(rng.sample([(r, c) for r in range(rows) for c in range(3)], count))
    things = []
    for row, column in cells:
        size = rng.randint(14, 18)
        x = column * cell_width + rng.randint(1, cell_width - size - 1)
        y = top + row * cell_height + rng.randint(1, cell_height - size - 1)
        things.append(Thing(shape, color, row, column, x, y, size))
    return Scene(tuple(things), sign, rng.randrange(len(TINTS)), rows)


_INSIDE: dict[str, Callable[[float, float], bool]] = {
    "circle": lambda x, y: x * x + y * y <= 0.95,
    "square": lambda x, y: max(abs(x), abs(y)) <= 0.85,
    "triangle": lambda x, y: -0.9 <= y <= 0.85 and abs(x) <= (y + 0.95) * 0.54,
    "cross": lambda x, y: max(abs(x), abs(y)) <= 0.95 and min(abs(x), abs(y)) <= 0.3,
}


@cache
def _shape_mask(shape: str, size: int) -> Image.Image:
    """The share of each pixel that the shape covers, from 4 x 4 points a pixel."""
    inside, points = _INSIDE[shape], [(i + 0.5) / 4 for i in range(4)]
    covered = []
    for row in range(size):
        for column in range(size):
            hits = sum(
                inside((column + dx) * 2 / size - 1, (row + dy) * 2 / size - 1)
                for dy in points
                for dx in points
            )
            covered.append(hits * 255 // 16)
    return Image.frombytes("L", (size, size), bytes(covered))


@cache
def _text_mask(text: str) -> Image.Image:
    """The word in block letters, white on black."""
    rows = []
    for row in range(7):
        bits = ".".join(GLYPHS[letter].split()[row] for letter in text.upper())
        rows.append(bytes(255 if bit == "#" else 0 for bit in bits))
    mask = Image.frombytes("L", (len(rows[0]), 7), b"".join(rows))
    return mask.resize((mask.width * GLYPH_SCALE, mask.height * GLYPH_SCALE), Image.Resampling.NEAREST)


def render_scene(scene: Scene) -> Image.Image:
    """The picture of a scene, 64 x 64 RGB."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), TINTS[scene.tint])
    for thing in scene.things:
        picture.paste(COLOR_VALUES[thing.color], (thing.x, thing.y), _shape_mask(thing.shape, thing.size))
    if scene.sign:
        sign = scene.sign
        box = (sign.x, sign.y, sign.x + sign.width - 1, sign.y + SIGN_HEIGHT - 1)
        outline = (90, 90, 90)  # a white sign stands out from a light ground
        ImageDraw.Draw(picture).rectangle(box, fill=COLOR_VALUES[sign.fill], outline=outline)
        picture.paste(COLOR_VALUES[sign.letters], (sign.x + 3, sign.y + 2), _text_mask(sign.text))
    return picture


def picture_bytes(scene: Scene) -> bytes:
    """The picture as a PNG file."""
    stream = io.BytesIO()
    render_scene(scene).save(stream, format="PNG")
    return stream.getvalue()


COLUMN_NAMES = ("left", "middle", "right")


def row_names(rows: int) -> tuple[str, ...]:
    return ("upper", "lower") if rows == 2 else ("upper", "central", "lower")


def place_of(thing: Thing, rows: int) -> str:
    """Where a thing is, such as "upper left"."""
    return f"{row_names(rows)[thing.row]} {COLUMN_NAMES[thing.column]}"


def plural_of(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _things_of(scene: Scene) -> str:
    count, thing = len(scene.things), scene.thing
    return f"{count} {thing.color} {thing.shape if count == 1 else plural_of(thing.shape)}"


def caption(scene: Scene) -> str:
    """Everything in the picture in one fixed order: how many of what, where row by row from the left, then the sign."""
    text = f"{_things_of(scene)}: " + ", ".join(place_of(t, scene.rows) for t in scene.things) + "."
    if scene.sign:
        s = scene.sign
        text += f" {s.fill} sign at the {'top' if s.at_top else 'bottom'}, {s.letters} letters: {s.text}."
    return text


def captions_of_parts(scene: Scene) -> list[tuple[str, str]]:
    """(what to describe, description) of the parts of a picture: its objects, and the sign and its letters."""
    parts = [("objects", f"{_things_of(scene)}.")]
    if scene.sign:
        parts += [("sign", f"{scene.sign.fill} sign."), ("letters", f"{scene.sign.letters} letters: {scene.sign.text}.")]
    return parts


# ---- what a text names -----------------------------------------------------------------------------------------------

_SINGULARS = {plural_of(shape): shape for shape in SHAPES}
_NAMES = frozenset((*COLOR_VALUES, *SHAPES, *WORDS, *NUMBERS))
_WORD = re.compile(r"[^\W_]+")


def singular_of(word: str) -> str:
    """A shape for its plural, any other word as it is."""
    return _SINGULARS.get(word, word)


def things(text: str) -> list[str]:
    """The colours, shapes, words and numbers of the sample that a text names, shapes in the singular."""
    return [word for word in map(singular_of, _WORD.findall(text.lower())) if word in _NAMES]


def things_of_caption(text: str) -> tuple[str, ...]:
    """Everything that the picture of a `caption` shows: its shape, its colours and the sign's text, each once.

    The number at the caption's head, of how many things there are, is no thing in the picture.
    """
    _, _, rest = text.partition(" ")
    return tuple(dict.fromkeys(things(rest)))
