"""Preference pairs: one prompt with its pictures, an answer that is preferred and one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.preference import REJECTED
from mmkd.data.reading import named_images, numbered, placed, refuse_unseen
from mmkd.data.samples import IMAGE_MARKER, Sample, Turn
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_FIELDS = ("id", "prompt", "image", "images", "chosen", "rejected")
_ROLES = ("system", "user", "assistant")


@register("formats", "preference")
class Preference(Format):
    """Preference pairs in JSON lines (or a list) of {prompt, images, chosen, rejected}, as preference trainers have them.

    - `prompt`: text, or messages [{role, content}] that end with the user's. `content` is text or a list of parts
      {type: text, text: ...} and {type: image}. `<image>` in a text is a picture too; within the text
      it keeps its place, at the start or the end it comes at the head.
    - `images` (a list of names) or `image` (one): inside the data's root; left out where there is no picture. Where no
      message says which pictures it shows, the first of the user's shows all.
    - `chosen`, `rejected`: text, or a list of the one message of the assistant.
    - `id`: optional; later rows of an id get "#2", "#3" ... appended.

    A file with other names: files={"field.prompt": "question", "field.image": "image_path"}. Samples end with the chosen answer
    (see `mmkd.data.preference.rejected_of`), so a stage without preference terms trains on these.

    DataError for missing keys, answers that are empty or equal, and messages that are no prompt or no answer.
    """

    gives = "pairs"
    own_data = True
    pictures_by = "the key `image` or `images` (`files: {field.image: KEY}` names another)"
    files = {"annotations": ("{split}.jsonl", "{split}.json")}
    images = {"images": ("{split}_images.zip", "images/{split}", "images", ".")}
    values = {f"field.{key}": "" for key in _FIELDS}

    def read(self, source: Source) -> Sequence[Sample]:
        names = {key: name for key in _FIELDS if (name := source.value(f"field.{key}"))}
        return numbered(source.made_of_file(partial(_pair, source), names=names))


def _pair(source: Source, row: Row) -> Sample:
    refuse_unseen(row)
    refs = named_images(source, row)
    chosen, rejected = _answers(row)
    turns = (*_prompt(row, len(refs)), Turn("assistant", chosen))
    return Sample(row.identifier("id", default=f"{source.split}-{row.number}"), refs, turns, {REJECTED: rejected})


def _answers(row: Row) -> tuple[str, str]:
    chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise DataError(f"{row.where}: 'chosen' and 'rejected' are the same answer ({chosen[:60]!r}); leave the row out")
    return chosen, rejected


def _answer(row: Row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError(
                f"{row.where}: {key!r} is a conversation of {len(value)} messages; it must be the assistant's one "
                "message, and what comes before it belongs to 'prompt'"
            )
        turn = _message(Row(value[0], f"{row.where} {key}"))
        if turn.role != "assistant" or turn.images:
            raise DataError(f"{row.where}: {key!r} is a message of {turn.role!r}; the assistant's, in words, is expected")
        value = turn.text
    if not isinstance(value, str):
        raise row.wrong(key, "a string or a list of one message")
    if not value.strip():
        raise DataError(f"{row.where}: {key!r} is empty; a pair needs two answers")
    if IMAGE_MARKER in value:
        raise DataError(f"{row.where}: {key!r} holds the marker {IMAGE_MARKER}; only the prompt shows pictures")
    return value


def _prompt(row: Row, images: int) -> tuple[Turn, ...]:
    value = row.get("prompt")
    if isinstance(value, str):
        messages = [Row({"role": "user", "content": value}, row.where)]
    elif isinstance(value, list):
        messages = [Row(message, f"{row.where} message {number}") for number, message in enumerate(value)]
    else:
        raise row.wrong("prompt", "a string or a list of messages")
    turns = [_message(message) for message in messages]
    asked = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in asked]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)] or len(roles) % 2 == 0:
        raise DataError(f"{row.where}: messages of {roles}; user and assistant must alternate, from user to user")
    return _with_images(row, turns, images)


def _with_images(row: Row, turns: list[Turn], images: int) -> tuple[Turn, ...]:
    marked = sum(turn.images for turn in turns)
    if marked == images:
        return tuple(turns)
    if marked:
        raise DataError(f"{row.where}: the prompt shows {marked} pictures and 'images' names {images}; they must match")
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    turns[first] = replace(turns[first], images=images)
    return tuple(turns)


def _message(row: Row) -> Turn:
    role = row.text("role")
    if role not in _ROLES:
        raise DataError(f"{row.where}: role {role!r}; there are {', '.join(_ROLES)}")
    content = row.get("content")
    if isinstance(content, list):
        content = "".join(_part(Row(part, f"{row.where} part {number}")) for number, part in enumerate(content))
    if not isinstance(content, str):
        raise row.wrong("content", "a string or a list of parts")
    if IMAGE_MARKER in content and role != "user":
        raise DataError(f"{row.where}: a picture in a message of {role!r}; only the user shows pictures")
    text, images, places = placed(content) if IMAGE_MARKER in content else (content, 0, ())
    if not text.strip():
        raise DataError(f"{row.where}: the message of {role!r} has no words")
    return Turn(role, text, images, places)


def _part(row: Row) -> str:
    kind = row.text("type")
    if kind == "image":
        return IMAGE_MARKER
    if kind == "text":
        return row.text("text")
    raise DataError(f"{row.where}: a part of type {kind!r}; there are text and image")
