"""Statements about the sample's scenes, and whether they are true: what a model learns that is to state and to judge.

Of each scene a true statement to a request for one, and a true and a false one to judge. A false statement is wrong in one word,
for which another of its kind stands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmkd.data.scenes import BRIGHT_COLORS, DARK_COLORS, NUMBERS, OBJECT_COLORS, SHAPES, WORDS, Scene, plural_of

SAY = "Say something about the picture."
JUDGE = "{statement}\nAnswer yes or no."
_Fact = tuple[str, str, Sequence[str]]  # a template, the right word, and the words that could stand there


def statements(rng: random.Random, scene: Scene) -> list[tuple[str, str, str]]:
    """(what kind, prompt, text) of one scene."""
    facts = _facts(scene)
    return [
        ("said", SAY, _stated(rng, facts, True)),
        ("true", JUDGE.format(statement=_stated(rng, facts, True)), "yes"),
        ("false", JUDGE.format(statement=_stated(rng, facts, False)), "no"),
    ]


def _facts(scene: Scene) -> list[_Fact]:
    thing, count = scene.thing, len(scene.things)
    objects, are = (thing.shape, "is") if count == 1 else (plural_of(thing.shape), "are")
    facts: list[_Fact] = [
        (f"The {objects} {are} {{}}.", thing.color, OBJECT_COLORS),
        (f"There {are} {{}} {thing.color} {objects}.", str(count), ("1", "2", "3")),
        (f"There {are} {count} {thing.color} {{}}.", objects, SHAPES if count == 1 else [plural_of(s) for s in SHAPES]),
    ]
    if sign := scene.sign:
        facts += [
            ("The color of the sign is {}.", sign.fill, DARK_COLORS + BRIGHT_COLORS),
            ("The color of the letters is {}.", sign.letters, DARK_COLORS + BRIGHT_COLORS),
            ("The text on the sign is {}.", sign.text, NUMBERS if sign.is_number else WORDS),
        ]
    return facts


def _stated(rng: random.Random, facts: Sequence[_Fact], true: bool) -> str:
    template, right, words = rng.choice(facts)
    return template.format(right if true else rng.choice([word for word in words if word != right]))
