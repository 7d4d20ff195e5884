"""Reads preference pairs: one prompt with its pictures, an answer that is preferred and one that is not.

A row is {prompt, images, chosen, rejected}, in JSON lines or a JSON list, as preference trainers have it:

- `prompt`: text, or messages [{role, content}] that end with the user's. `content` is text or a list of parts
  {type: text, text: ...} and {type: image}. `<image>` in a text is a picture too; it stands at the start or the end.
- `images` (a list of names) or `image` (one): inside the data's root; left out where there is no picture. Where no
  message says which pictures it shows, the first of the user's shows all.
- `chosen`, `rejected`: text, or a list of the one message of the assistant.
- `id`: optional.

A file with other names: files={"field.prompt": "question", "field.image": "image_path"}.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmkd.data.annotations import Row as _Row
from mmkd.data.annotations import rows as _rows
from mmkd.data.formats import _source, _without_markers, named_rows, subset
from mmkd.data.samples import IMAGE_MARKER, Sample, Turn
from mmkd.errors import DataError

REJECTED = "rejected"  # key of `Sample.meta` that holds the answer not preferred
FIELDS = ("id", "prompt", "image", "images", "chosen", "rejected")
ROLES = ("system", "user", "assistant")


def read_preferences(
    root: Path,
    split: str,
    *,
    files: dict[str, str] | None = None,
    limit: int | None = None,
    image_limit: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """The pairs of {split}.jsonl or {split}.json: samples that end with the chosen answer (see `rejected_of`).

    A stage without preference terms so trains on the chosen answers. Later rows of an id get "#2", "#3" ... appended.
    `files` names "annotations", "images" (the folder or zip of the pictures) and fields, as above; `limit`,
    `image_limit` and `seed` are as in `mmkd.data.formats.read_questions`.

    Raises DataError, with file, row and key, for missing keys, answers that are empty or equal, images that leave
    the root, and messages that are no prompt or no answer.
    """
    known = ("annotations", "images", *(f"field.{name}" for name in FIELDS))
    source = _source(Path(root), split, files, known)
    path = source.annotations("{split}.jsonl", "{split}.json")
    names = {name: source.files[f"field.{name}"] for name in FIELDS if f"field.{name}" in source.files}
    rows = list(_rows(path, names))
    if not rows:
        raise DataError(f"{path} holds no pairs")
    samples = []
    for row, name, refs in named_rows(rows, source):
        chosen, rejected = _answers(row)
        turns = (*_prompt(row, len(refs)), Turn("assistant", chosen))
        samples.append(Sample(name, refs, turns, {REJECTED: rejected}))
    return subset(samples, limit, image_limit, seed)


def rejected_of(sample: Sample) -> Sample:
    """The same prompt and pictures with the rejected answer. Raises DataError for a sample that is no pair."""
    if REJECTED not in sample.meta:
        raise DataError(
            f"sample {sample.id!r} has one answer, not a chosen and a rejected one; preference terms need data of "
            "`format: preference` in all of their stage"
        )
    return replace(sample, turns=(*sample.prompt_turns, Turn("assistant", sample.meta[REJECTED])))


def _answers(row: _Row) -> tuple[str, str]:
    chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise DataError(f"{row.where}: 'chosen' and 'rejected' are the same answer ({chosen[:60]!r}); leave the row out")
    return chosen, rejected


def _answer(row: _Row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError(
                f"{row.where}: {key!r} is a conversation of {len(value)} messages; it must be the assistant's one "
                "message, and what comes before it belongs to 'prompt'"
            )
        turn = _message(_Row(value[0], f"{row.where} {key}"))
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


def _prompt(row: _Row, images: int) -> tuple[Turn, ...]:
    value = row.get("prompt")
    if isinstance(value, str):
        messages = [_Row({"role": "user", "content": value}, row.where)]
    elif isinstance(value, list):
        messages = [_Row(message, f"{row.where} message {number}") for number, message in enumerate(value)]
    else:
        raise row.wrong("prompt", "a string or a list of messages")
    turns = [_message(message) for message in messages]
    asked = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in asked]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)] or len(roles) % 2 == 0:
        raise DataError(f"{row.where}: messages of {roles}; user and assistant must alternate, from user to user")
    return _with_images(row, turns, images)


def _with_images(row: _Row, turns: list[Turn], images: int) -> tuple[Turn, ...]:
    marked = sum(turn.images for turn in turns)
    if marked == images:
        return tuple(turns)
    if marked:
        raise DataError(f"{row.where}: the prompt shows {marked} pictures and 'images' names {images}; they must match")
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    turns[first] = replace(turns[first], images=images)
    return tuple(turns)


def _message(row: _Row) -> Turn:
    role = row.text("role")
    if role not in ROLES:
        raise DataError(f"{row.where}: role {role!r}; there are {', '.join(ROLES)}")
    content = row.get("content")
    if isinstance(content, list):
        content = "".join(_part(_Row(part, f"{row.where} part {number}")) for number, part in enumerate(content))
    if not isinstance(content, str):
        raise row.wrong("content", "a string or a list of parts")
    images = content.count(IMAGE_MARKER)
    if images and role != "user":
        raise DataError(f"{row.where}: a picture in a message of {role!r}; only the user shows pictures")
    text = _without_markers(content, row.where) if images else content
    if not text.strip():
        raise DataError(f"{row.where}: the message of {role!r} has no words")
    return Turn(role, text, images)


def _part(row: _Row) -> str:
    kind = row.text("type")
    if kind == "image":
        return IMAGE_MARKER
    if kind == "text":
        return row.text("text")
    raise DataError(f"{row.where}: a part of type {kind!r}; there are text and image")
