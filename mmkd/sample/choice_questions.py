"""Multiple-choice questions about scenes and short texts, as ScienceQA lays them out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.scenes import COLUMN_NAMES, NUMBERS, OBJECT_COLORS, SHAPES, WORDS, Scene, plural_of
from mmkd.sample.annotators import choice_opinions, majority
from mmkd.sample.splits import owner_of

TEXT_SHARE = 0.2  # of the questions, without a picture


@dataclass(frozen=True)
class Item:
    """A multiple-choice question; `truth` is the index of the right choice."""

    kind: str
    question: str
    choices: tuple[str, ...]
    truth: int
    hint: str = ""


# kind -> subject, topic, skill, grade with two choices (one more with each further choice), lecture
_KINDS = {
    "color": ("natural science", "physics", "Name the color of an object", 1, "Objects differ in color."),
    "shape": ("natural science", "physics", "Name the shape of an object", 1, "Objects differ in shape."),
    "count": ("natural science", "science-and-engineering-practices", "Count objects", 2,
              "To count objects, look at each of them once."),
    "place": ("social science", "geography", "Read a position in a picture", 4,
              "Left, middle and right tell where something is."),
    "legend": ("social science", "geography", "Use the legend of a map", 8,
               "A legend tells what the symbols of a map mean."),
    "sign": ("language science", "word-study", "Read a word on a sign", 2, "Signs give names and numbers."),
    "boxes": ("natural science", "physics", "Find a fact in a text", 3, "A text can tell where things are."),
    "homes": ("social science", "geography", "Find who lives where", 5, "A text can tell where people live."),
    "meanings": ("language science", "vocabulary", "Find the meaning of a word", 7,
                 "A glossary tells what unknown words mean."),
}  # fmt: skip


def _make_item(
    rng: random.Random,
    kind: str,
    question: str,
    truth: str,
    first: Sequence[str],
    rest: Sequence[str],
    hint: str = "",
) -> Item:
    """A question with 2-4 choices: distractors from `first` before those from `rest`, all in random order."""
    count = rng.randint(2, 4) - 1
    near = [a for a in first if a != truth]
    far = [a for a in rest if a != truth and a not in near]
    distractors = (rng.sample(near, len(near)) + rng.sample(far, len(far)))[:count]
    choices = [truth, *distractors]
    rng.shuffle(choices)
    return Item(kind, question, tuple(choices), choices.index(truth), hint)


def _whole_list(kind: str, question: str, truth: str, pool: Sequence[str]) -> Item:
    """A question that offers all there is, in the order of the list, as schoolbooks do with counts and scales."""
    return Item(kind, question, tuple(pool), pool.index(truth))


def _ask_color(rng: random.Random, scene: Scene) -> Item:
    plural = len(scene.things) > 1
    template = rng.choice(("Which color are the {}?", "What is the color of the {}?")) if plural else rng.choice(
        ("Which color is the {}?", "What is the color of the {}?")
    )
    question = template.format(plural_of(scene.thing.shape) if plural else scene.thing.shape)
    return _make_item(rng, "color", question, scene.thing.color, (), OBJECT_COLORS)


def _ask_shape(rng: random.Random, scene: Scene) -> Item:
    question = rng.choice(("Which shape is {}?", "What is the shape of the {} objects?")).format(scene.thing.color)
    return _whole_list("shape", question, scene.thing.shape, SHAPES)


def _ask_count(rng: random.Random, scene: Scene) -> Item:
    question = rng.choice(("How many objects are there?", "How many shapes are in the picture?"))
    return _whole_list("count", question, str(len(scene.things)), ("1", "2", "3"))


def _ask_place(rng: random.Random, scene: Scene) -> Item | None:
    if len(scene.things) > 1:
        return None
    question = rng.choice(("Where is the {}?", "In which part of the picture is the {}?")).format(scene.thing.shape)
    return _whole_list("place", question, COLUMN_NAMES[scene.thing.column], COLUMN_NAMES)


_SYMBOLS = ("a lake", "a school", "a bridge", "a forest", "a station", "a museum", "a harbor", "a market")


def _ask_legend(rng: random.Random, scene: Scene) -> Item:
    """Needs the picture (which shape there is) and the hint (what that shape means)."""
    thing = scene.thing
    shapes = [thing.shape, *rng.sample([s for s in SHAPES if s != thing.shape], 3)]
    rng.shuffle(shapes)
    meanings = rng.sample(_SYMBOLS, len(shapes))
    hint = " ".join(
        f"On the map, a {shape} means {what}." for shape, what in zip(shapes, meanings, strict=True)
    )
    truth = meanings[shapes.index(thing.shape)]
    return _make_item(rng, "legend", f"What does the {thing.color} symbol mean?", truth, meanings, (), hint)


def _ask_sign(rng: random.Random, scene: Scene) -> Item | None:
    if scene.sign is None:
        return None
    pool = NUMBERS if scene.sign.is_number else WORDS
    what = "number" if scene.sign.is_number else "word"
    question = rng.choice(("Which {} is on the sign?", "Which {} does the sign show?")).format(what)
    return _make_item(rng, "sign", question, scene.sign.text, (), pool)


def picture_items(rng: random.Random, scene: Scene) -> list[Item]:
    """Up to three questions, of different kinds."""
    kinds = [_ask_color, _ask_shape, _ask_count, _ask_place, _ask_sign, _ask_legend]
    items = [item for ask in rng.sample(kinds, len(kinds)) if (item := ask(rng, scene))]
    return items[:3]


_THINGS = tuple(
    "ball bell book brush cake coin cup drum fan fork hat key lamp map pen ring rope shell shoe spoon".split()
)
_PEOPLE = tuple("Ada Ben Cleo Dan Emma Finn Gus Hana Ivan Jill Kim Leo Mia Noah".split())
_PLACES = (
    "by the sea",
    "by the river",
    "in the city",
    "in the desert",
    "in the forest",
    "in the hills",
    "in the port",
    "in the valley",
    "near the lake",
    "on a farm",
    "on an island",
    "on the plain",
)
_NEW_WORDS = tuple("bim dax fep gorp jik kulo lorn mip nuv pell quon rasp soma tal vek wug yost zif".split())
_MEANINGS = tuple(
    "bird bread cloud dog fire flower friend horse house "
    "king milk night rain salt snow tree water wind".split()
)
_TEXTS = (
    ("boxes", OBJECT_COLORS, _THINGS, "In the {} box there is a {}.", "What is in the {} box?"),
    ("homes", _PEOPLE, _PLACES, "{} lives {}.", "Where does {} live?"),
    ("meanings", _NEW_WORDS, _MEANINGS, "The word {} means {}.", "What does the word {} mean?"),
)


def _text_item(rng: random.Random) -> Item:
    """A question without a picture about one of 2-4 facts; the hint holds all of the choices."""
    kind, keys, values, fact, question = rng.choice(_TEXTS)
    count = rng.randint(2, 4)
    names, facts = rng.sample(keys, count), rng.sample(values, count)
    hint = " ".join(fact.format(name, value) for name, value in zip(names, facts, strict=True))
    asked = rng.randrange(count)
    return _make_item(rng, kind, question.format(names[asked]), facts[asked], facts, (), hint)


def text_item_of(rng: random.Random, split: str, seen: set[tuple[str, str]]) -> Item:
    """The first text question of the stream that belongs to this split and has not been asked in it."""
    while True:
        item = _text_item(rng)
        # The order of the facts does not make another question.
        content = ".".join(sorted(fact.strip() for fact in item.hint.split("."))) + item.question
        if owner_of(content)[1] == split and (item.hint, item.question) not in seen:
            seen.add((item.hint, item.question))
            return item


def problem(rng: random.Random, item: Item, split: str, has_image: bool, accuracy: float) -> dict[str, Any]:
    """A question as an entry of problems.json, with the annotators' answers."""
    subject, topic, skill, grade, lecture = _KINDS[item.kind]
    answers = choice_opinions(rng, item.truth, item.choices, accuracy)
    return {
        "question": item.question,
        "choices": list(item.choices),
        "answer": answers[0] if split == "train" else majority(answers, item.truth),
        "answers": answers,
        "hint": item.hint,
        "image": "image.png" if has_image else None,
        "task": "closed choice",
        "grade": f"grade{grade + len(item.choices) - 2}",
        "subject": subject,
        "topic": topic,
        "category": item.kind,
        "skill": skill,
        "lecture": lecture,
        "solution": f"The answer is {item.choices[item.truth]}.",
        "split": split,
    }
