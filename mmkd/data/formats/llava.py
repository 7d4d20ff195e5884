"""Conversations in LLaVA's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import marks_picture, named_images, numbered, placed, refuse_unseen
from mmkd.data.samples import IMAGE_MARKER, Sample, Turn
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_VIDEO = "<video>"


@register("formats", "llava")
class Llava(Format):
    """LLaVA's conversations: a list of {id, image, conversations: [{from, value}, ...]}.

    `image` is a name, a list of names, or left out. The marker <image> in a human's turn says where a picture stands: at the
    start or the end of the turn it comes at the head, as in LLaVA; within the text it keeps its place. In a conversation without
    pictures the word <image> within a text is a word. Turns alternate between human and gpt, after at most one of system, and end
    with gpt. The published mixtures repeat ids: later samples of an id get "#2", "#3" ... appended. "images" is the folder or zip
    that the rows' names are in.

    DataError for rows with a video, and where the markers and the pictures differ in number.
    """

    gives = "samples"
    own_data = True
    pictures_by = "the key `image` or `images`"
    files = {"annotations": ("{split}.json", "{split}.jsonl")}
    images = {"images": ("{split}_images.zip", "images/{split}", "images", ".")}

    def read(self, source: Source) -> Sequence[Sample]:
        return numbered(source.made_of_file(partial(_sample, source)))


def _sample(source: Source, row: Row) -> Sample:
    refuse_unseen(row)
    refs = named_images(source, row)
    return Sample(row.identifier("id", default=f"{source.split}-{row.number}"), refs, _turns(row, len(refs)))


def _turns(row: Row, images: int) -> tuple[Turn, ...]:
    turns = tuple(
        _turn(Row(value, f"{row.where} turn {number}"), images)
        for number, value in enumerate(row.list_of("conversations", object, "turns"))
    )
    asked = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in asked]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{row.where}: {_wrong_order(roles)}; human and gpt must alternate, from human to gpt")
    marked = sum(turn.images for turn in turns)
    if marked != images:
        raise DataError(f"{row.where}: {marked} markers {IMAGE_MARKER} and {images} images; they must match")
    return turns


def _wrong_order(roles: list[str]) -> str:
    if not roles:
        return "there are no turns"
    if roles[0] != "user":
        return "the first turn is gpt's"
    if roles[-1] != "assistant" and roles == (["user", "assistant"] * len(roles))[: len(roles)]:
        return "the last turn is the human's"
    return "the turns do not alternate"


def _turn(row: Row, images: int) -> Turn:
    """images: of the whole conversation."""
    role, text = row.text("from"), row.text("value")
    if role not in _ROLES:
        raise DataError(f"{row.where}: speaker {role!r}; there are {', '.join(_ROLES)}")
    if text.strip().startswith(_VIDEO) or text.strip().endswith(_VIDEO):
        raise DataError(f"{row.where}: a marker {_VIDEO}; video is not supported")
    if IMAGE_MARKER in text and images and _ROLES[role] != "user":
        raise DataError(f"{row.where}: marker {IMAGE_MARKER} in a turn of {role!r}; only the human shows pictures")
    text, count, places = placed(text) if images or (_ROLES[role] == "user" and marks_picture(text)) else (text, 0, ())
    if not text.strip() and not count:
        raise DataError(f"{row.where}: the turn of {role!r} is empty")
    return Turn(_ROLES[role], text, count, places)
