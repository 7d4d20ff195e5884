"""TextVQA 0.5.1 and sets in its layout."""

from __future__ import annotations

from pathlib import Path

from mmkd.data.annotations import Row, as_list, load
from mmkd.data.formats import Format
from mmkd.data.row_files import unread_rows
from mmkd.data.samples import Question
from mmkd.data.scenes import things_of_caption
from mmkd.data.source import Source
from mmkd.registry import register


@register("formats", "textvqa")
class TextVQA(Format):
    """TextVQA: TextVQA_0.5.1_{split}.json; OCR tokens by `ocr`, the embedded sample's captions by `shown`."""

    files = {"annotations": "TextVQA_0.5.1_{split}.json", "ocr": "", "shown": ""}
    images = {
        "images": (
            "{split}_images/{image_id}.jpg",
            "train_images/{image_id}.jpg",  # officially of train and val
            "train_val_images.zip/train_images/{image_id}.jpg",
            "images/{split}/{image_id}.jpg",
            "images/{split}/{image_id}.png",
            "images/{image_id}.jpg",
        )
    }

    def read(self, source: Source) -> list[Question]:
        tokens = _ocr_tokens(source.path("ocr")) if source.has("ocr") else {}
        shown = _things_shown(source.path("shown")) if source.has("shown") else {}
        return source.made(source.unread(inner="data"), lambda row: _question(source, row, tokens, shown))


def _question(source: Source, row: Row, tokens: dict[str, tuple[str, ...]], shown: dict[str, tuple[str, ...]]) -> Question:
    image_id = row.identifier("image_id")
    # The official test split has no answers.
    answers = tuple(row.texts("answers")) if row.has("answers") else ()
    return Question(
        id=row.identifier("question_id"),
        question=row.text("question"),
        images=(source.image(where=row.where, image_id=image_id),),
        answer=answers[0] if answers else "",
        references=answers,
        ocr_tokens=tokens.get(image_id, ()),
        shown=shown.get(image_id, ()),
        categories={key: row.text(key) for key in ("category", "field") if row.has(key)},
    )


def _things_shown(path: Path) -> dict[str, tuple[str, ...]]:
    """Image id -> everything in the picture, from captions of the embedded sample, whose ids end in the image's."""
    captions = (unread() for unread in unread_rows(path))
    return {row.identifier("id").rpartition("-")[2]: things_of_caption(row.text("answer")) for row in captions}


def _ocr_tokens(path: Path) -> dict[str, tuple[str, ...]]:
    """Image id -> tokens, from the official {data: [{image_id, ocr_tokens}]} or a .jsonl of such rows."""
    if path.suffix == ".jsonl":
        found = (unread() for unread in unread_rows(path))
    else:
        data = as_list(path, Row(load(path), str(path)).get("data"), " as 'data'")
        found = (Row(value, f"{path} entry {number}") for number, value in enumerate(data))
    return {row.identifier("image_id"): tuple(row.texts("ocr_tokens")) for row in found}
