"""Texts of the sample that are longer than an answer: what a model learns that is to write data, not only to answer.

Of each scene of the TextVQA set: a question answered behind a description and behind a table of what is seen, a new question with
its answer, and one like a given question. Answers are what the picture shows; no annotator errs here.
"""

from __future__ import annotations

import json
import random

from mmkd.data.scenes import Scene, caption, place_of
from mmkd.sample.open_questions import OpenItem, kind_item, open_items

DESCRIBED = "{question}\nDescribe, then answer."
LISTED = "{question}\nList the objects, then answer."
ASKED = "Ask a question about the picture and answer it."
ASKED_LIKE = "Ask a question like this and answer it: {question}"


def table(scene: Scene) -> str:
    """Each thing and the sign on a line of its own: what, and where or in which letters."""
    lines = [f"{thing.name} | {place_of(thing, scene.rows)}" for thing in scene.things]
    if scene.sign:
        place = "top" if scene.sign.at_top else "bottom"
        lines.append(f"{scene.sign.fill} sign | {place} | {scene.sign.letters} letters: {scene.sign.text}")
    return "\n".join(lines)


def writings(rng: random.Random, scene: Scene) -> list[tuple[str, str, str]]:
    """(what kind, prompt, text) of one scene with a sign."""
    items = open_items(rng, scene)
    described, listed, asked = (rng.choice(items) for _ in range(3))
    like = kind_item(rng, scene, asked.kind)
    return [
        ("described", DESCRIBED.format(question=described.question), f"{caption(scene)}\nAnswer: {described.truth}"),
        ("listed", LISTED.format(question=listed.question), f"{table(scene)}\nAnswer: {listed.truth}"),
        ("asked", ASKED, _as_json(rng.choice(items))),
        ("asked like", ASKED_LIKE.format(question=asked.question), _as_json(like)),
    ]


def _as_json(item: OpenItem) -> str:
    return json.dumps({"question": item.question, "answer": item.truth})
