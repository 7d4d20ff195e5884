"""Conversations in LLaVA's JSON."""

from __future__ import annotations

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import named_rows, without_markers
from mmkd.data.samples import IMAGE_MARKER, Sample, Turn
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@register("formats", "llava")
class Llava(Format):
    """LLaVA's conversations: a list of {id, image, conversations: [{from, value}, ...]}.

    `image` is a name, a list of names, or left out. The marker <image> says which turn shows a picture. It stands at the start
    or the end of the turn; the picture comes at the head, as in LLaVA. Turns alternate between human and gpt, after at most one
    of system, and end with gpt. The published mixtures repeat ids: later samples of an id get "#2", "#3" ... appended.
    "images" is the folder or zip that the rows' names are in.

    DataError for a marker in the middle of a text, and where the markers and the pictures differ in number.
    """

    gives = "samples"
    files = {"annotations": ("{split}.json", "{split}.jsonl")}
    images = {"images": ("{split}_images.zip", "images/{split}", "images", ".")}

    def read(self, source: Source) -> list[Sample]:
        return [Sample(name, refs, _turns(row, len(refs))) for row, name, refs in named_rows(source.rows(), source)]


def _turns(row: Row, image_count: int) -> tuple[Turn, ...]:
    turns = tuple(
        _turn(Row(value, f"{row.where} turn {number}"))
        for number, value in enumerate(row.list_of("conversations", object, "turns"))
    )
    asked = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in asked]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{row.where}: turns of {roles}; human and gpt must alternate, from human to gpt")
    marked = sum(turn.images for turn in turns)
    if marked != image_count:
        raise DataError(f"{row.where}: {marked} markers {IMAGE_MARKER} and {image_count} images; they must match")
    return turns


def _turn(row: Row) -> Turn:
    role, text = row.text("from"), row.text("value")
    if role not in _ROLES:
        raise DataError(f"{row.where}: speaker {role!r}; there are {', '.join(_ROLES)}")
    images = text.count(IMAGE_MARKER)
    if images and _ROLES[role] != "user":
        raise DataError(f"{row.where}: marker {IMAGE_MARKER} in a turn of {role!r}; only the human shows pictures")
    if images:
        text = without_markers(text, row.where)
    if not text.strip() and not images:
        raise DataError(f"{row.where}: the turn of {role!r} is empty")
    return Turn(_ROLES[role], text, images)
