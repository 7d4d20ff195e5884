"""Questions in JSON lines, for data of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mmkd.data.annotations import Row
from mmkd.data.formats import Format
from mmkd.data.reading import check_markers, choice_index, choices_of, named_images, refuse_unseen
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

_FIELDS = ("id", "question", "image", "images", "answer", "answers", "choices", "hint", "ocr_tokens")


@register("formats", "jsonl")
class JsonLines(Format):
    """JSON lines (or a list) of {question, image or images, answer or answers, id, choices, hint, ocr_tokens, categories, told}.

    Only `question` must be there; rows without answers can be predicted, not trained on. With choices, `answer` is an index
    (from 0) or one of the choices, word for word. `categories` is an object of strings, and so is `told`, what a teacher may be
    told. Where a file has other names, `files` says so: {"field.question": "text", "field.answer": "label"}, and
    {"field.categories": "type, level"} names the keys whose values are the categories. "images" is the folder or zip that the
    rows' names are in.
    """

    own_data = True
    pictures_by = "the key `image` or `images` (`files: {field.image: KEY}` names another)"
    files = {"annotations": "{split}.jsonl"}
    images = {"images": ("{split}_images.zip", "images/{split}", "images", ".")}
    values = {f"field.{key}": "" for key in (*_FIELDS, "categories", "told")}

    def read(self, source: Source) -> Sequence[Question]:
        names = {key: name for key in (*_FIELDS, "told") if (name := source.value(f"field.{key}"))}
        groups = tuple(name.strip() for name in source.value("field.categories").split(",") if name.strip())
        return source.made_of_file(partial(_question, source, groups), names=names)


def _question(source: Source, groups: Sequence[str], row: Row) -> Question:
    refuse_unseen(row)
    row.has("provenance")  # how a row was written (`mmkd.writing.rows`): for people, not for training
    choices = choices_of(row) if row.has("choices") else []
    answers = _choice_answers(row, choices) if choices else _answers(row)
    references = tuple(choices[index] for index in answers) if choices else tuple(answers)
    images = named_images(source, row)
    check_markers(row.where, row.text("question"), references, len(images))
    return Question(
        id=row.identifier("id", default=f"{source.split}-{row.number}"),
        question=row.text("question"),
        images=images,
        answer=references[0] if references else "",
        references=references,
        choices=tuple(choices),
        answer_index=answers[0] if choices and answers else None,
        hint=row.text("hint", default=""),
        ocr_tokens=tuple(row.texts("ocr_tokens")) if row.has("ocr_tokens") else (),
        categories=_categories(row, groups),
        told=_strings(row, "told"),
    )


def _answers(row: Row) -> list[str]:
    if row.has("answer") and row.has("answers"):
        raise DataError(f"{row.where}: both 'answer' and 'answers'; give one answer or a list of them")
    if row.has("answer"):
        return [row.text("answer")]
    if not row.has("answers"):
        return []
    answers = row.texts("answers")
    if not answers:
        raise DataError(f"{row.where}: 'answers' is empty; leave the key out where there is no answer")
    return answers


def _choice_answers(row: Row, choices: list[str]) -> list[int]:
    """The answers as indices of the choices."""
    if row.has("answer") and not isinstance(row.get("answer"), str):
        return [choice_index(row, "answer", len(choices))]
    answers = _answers(row)
    strange = next((answer for answer in answers if answer not in choices), None)
    if strange is not None:
        raise DataError(f"{row.where}: answer {strange!r} is none of the choices {choices}")
    return [choices.index(answer) for answer in answers]


def _categories(row: Row, groups: Sequence[str]) -> dict[str, str]:
    if groups:
        return {key: row.identifier(key) for key in groups if row.has(key)}
    return _strings(row, "categories")


def _strings(row: Row, key: str) -> dict[str, str]:
    """An object of strings in a row."""
    if not row.has(key):
        return {}
    found = Row(row.get(key), f"{row.where} {key}")
    return {name: found.text(name) for name in found.value}
