"""COCO: how its pictures are called, and which of its 80 objects a text names.

Objects go by the table of synonyms of CHAIR's authors (`coco_objects.yaml`; Rohrbach et al. 2018, arXiv 1809.02156). The authors
take words to their singular with a library of English; here a word counts as a plural of whatever word of the table it is
formed from, which is the same for the table's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mmkd.base.cards import read_yaml
from mmkd.data.annotations import Row
from mmkd.data.samples import ImageRef
from mmkd.data.source import Source
from mmkd.errors import DataError

NO_OBJECT = "(no COCO object)"  # the reference of a picture without any
COCO_IMAGES = {"images": "{split}"}
COCO_NAMES = {"image_name": "COCO_{split}_{id}.jpg"}

_TABLE = Path(__file__).parent / "coco_objects.yaml"
# What is joined by a hyphen is one word, as for the authors' tokenizer.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"))


@dataclass(frozen=True)
class _Names:
    """`objects`: name of one or two words -> object. `pairs`: two words -> what they are read as."""

    objects: dict[str, str]
    pairs: dict[str, str]
    plurals: dict[str, str]
    words: frozenset[str]


@lru_cache(maxsize=1)
def _names() -> _Names:
    table = read_yaml(_TABLE)
    objects = {name: kind for kind, names in table["objects"].items() for name in (kind, *names)}
    pairs = {name: name for name in objects if " " in name}
    for rule in table["read_as"]:
        pairs |= {words.format(name): rule["as"].format(name) for words in rule["words"] for name in rule["names"]}
    words = frozenset(word for name in (*objects, *pairs) for word in name.split())
    return _Names(objects, pairs, table["plurals"], words)


def coco_image(source: Source, row: Row) -> ImageRef:
    """COCO's picture of the row's `image_id`; the format's value `image_name` has `{id}` for its number of twelve digits."""
    number = row.integer("image_id")
    return source.image(source.value("image_name").replace("{id}", f"{number:012d}"), where=row.where)


def coco_object(name: str) -> str:
    """COCO's category of that name, such as "tv". Raises DataError for any other."""
    if _names().objects.get(name) != name:
        raise DataError(f"{name!r} is none of COCO's 80 objects; CHAIR is defined for these alone")
    return name


def mentions(text: str) -> list[str]:
    """COCO's objects in the order in which a text names them, as often as it does."""
    names = _names()
    words = list(_joined([_singular(word) for word in _WORD.findall(text.lower())]))
    if "toilet" in words:  # "the seat of the toilet"
        words = [word for word in words if word != "seat"]
    return [names.objects[word] for word in words if word in names.objects]


def _singular(word: str) -> str:
    """The word of the table that this one is a plural of, else the word as it is."""
    names = _names()
    if word in names.words:
        return word
    formed = (word[: -len(ending)] + single for ending, single in _ENDINGS if word.endswith(ending))
    return next((found for found in (names.plurals.get(word, ""), *formed) if found in names.words), word)


def _joined(words: Sequence[str]) -> Iterator[str]:
    """The words, with two that belong together as one."""
    pairs, place = _names().pairs, 0
    while place < len(words):
        pair = " ".join(words[place : place + 2])
        yield pairs.get(pair, words[place])
        place += 2 if pair in pairs else 1
