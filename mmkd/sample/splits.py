"""Which set and split a scene or a text belongs to: decided by a hash of its content, whatever the seed."""

from __future__ import annotations

import hashlib
import random

from mmkd.data.scenes import Scene, draw_scene

SPLIT_SHARES = {"train": 8, "val": 1, "test": 1}  # tenths of the space of scenes


def owner_of(text: str) -> tuple[str, str]:
    """The (set, split) that owns a scene or a text, by its content alone."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    owner = ("scienceqa", "textvqa")[number % 2]
    place = number // 2 % sum(SPLIT_SHARES.values())
    for split, share in SPLIT_SHARES.items():
        if place < share:
            return owner, split
        place -= share
    raise RuntimeError("the shares of the splits do not cover the space")


def scene_of(rng: random.Random, owner: str, split: str) -> Scene:
    """The first scene of the stream that belongs to this set and split."""
    sign_probability = 0.75 if owner == "scienceqa" else 1.0
    while True:
        scene = draw_scene(rng, sign_probability)
        if owner_of(scene.description) == (owner, split):
            return scene
