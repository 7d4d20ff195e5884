"""Questions with free-form answers about scenes, as TextVQA lays them out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.scenes import (
    BRIGHT_COLORS,
    DARK_COLORS,
    IMAGE_SIZE,
    NUMBERS,
    OBJECT_COLORS,
    SHAPES,
    WORDS,
    Scene,
    plural_of,
)
from mmkd.sample.annotators import open_opinions


@dataclass(frozen=True)
class OpenItem:
    kind: str
    question: str
    truth: str
    pool: Sequence[str]  # what an annotator may answer


def _open_sign_text(rng: random.Random, scene: Scene) -> OpenItem:
    what = "number" if scene.sign.is_number else "word"
    templates = (
        f"What {what} is on the sign?",
        f"What {what} does the sign show?",
        "What is written on the sign?",
    )
    return OpenItem(
        "text", rng.choice(templates), scene.sign.text, NUMBERS if scene.sign.is_number else WORDS
    )


def _open_sign_color(rng: random.Random, scene: Scene) -> OpenItem:
    question = rng.choice(("What color is the sign?", "What is the color of the sign?"))
    return OpenItem("sign color", question, scene.sign.fill, DARK_COLORS + BRIGHT_COLORS)


def _open_letter_color(rng: random.Random, scene: Scene) -> OpenItem:
    question = rng.choice(("What color are the letters on the sign?", "In what color is the sign written?"))
    return OpenItem("letter color", question, scene.sign.letters, DARK_COLORS + BRIGHT_COLORS)


def _open_color(rng: random.Random, scene: Scene) -> OpenItem:
    shape = scene.thing.shape
    template = rng.choice(("What color is the {}?", "What is the color of the {}?"))
    if len(scene.things) > 1:
        template, shape = template.replace("What color is", "What color are"), plural_of(shape)
    return OpenItem("color", template.format(shape), scene.thing.color, OBJECT_COLORS)


def _open_shape(rng: random.Random, scene: Scene) -> OpenItem:
    question = rng.choice(("What shape is {}?", "What shape are the {} objects?")).format(scene.thing.color)
    return OpenItem("shape", question, scene.thing.shape, SHAPES)


def _open_count(rng: random.Random, scene: Scene) -> OpenItem:
    question = rng.choice(("How many objects are there?", "How many shapes are in the picture?"))
    return OpenItem("count", question, str(len(scene.things)), ("1", "2", "3"))


_OTHER_KINDS = {
    "sign color": _open_sign_color, "letter color": _open_letter_color, "color": _open_color, "shape": _open_shape,
    "count": _open_count,
}  # fmt: skip


def open_items(rng: random.Random, scene: Scene) -> list[OpenItem]:
    """What the sign says, and one or two other questions."""
    chosen = rng.sample([*_OTHER_KINDS.values()], rng.randint(1, 2))
    return [_open_sign_text(rng, scene), *(ask(rng, scene) for ask in chosen)]


def kind_item(rng: random.Random, scene: Scene, kind: str) -> OpenItem:
    """A question of the kind "text", "sign color", "letter color", "color", "shape" or "count"."""
    return {"text": _open_sign_text, **_OTHER_KINDS}[kind](rng, scene)


def entry(
    rng: random.Random,
    item: OpenItem,
    scene: Scene,
    split: str,
    image_id: str,
    question_id: int,
    accuracy: float,
) -> dict[str, Any]:
    """A question as an entry of TextVQA's file, with the annotators' answers."""
    classes = [*sorted({t.shape.capitalize() for t in scene.things}), "Sign"]
    return {
        "question": item.question,
        "image_id": image_id,
        "image_classes": classes,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": IMAGE_SIZE,
        "image_height": IMAGE_SIZE,
        "answers": open_opinions(rng, item.truth, item.pool, accuracy),
        "question_tokens": item.question.lower().rstrip("?").split(),
        "question_id": question_id,
        "set_name": split,
        "category": item.kind,
    }
