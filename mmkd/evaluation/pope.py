"""Reads POPE as its authors publish it: coco_pope_{random,popular,adversarial}.json, one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmkd.data.samples import DataError, ImageRef, Question

SAMPLINGS = ("random", "popular", "adversarial")
DEFAULT_FILES = {"annotations": "coco_pope_{split}.json", "images": "val2014"}


def read_pope(root: Path, split: str, *, files: dict[str, str] | None = None) -> list[Question]:
    """The questions of one sampling of absent objects, or of all three with split "all".

    `files`: "annotations", a pattern with {split}, and "images", the folder or zip archive of COCO's
    val2014; both below `root`.  Raises DataError naming file, line and key.
    """
    files = DEFAULT_FILES | (files or {})
    unknown = sorted(set(files) - set(DEFAULT_FILES))
    if unknown or split not in (*SAMPLINGS, "all"):
        raise DataError(
            f"pope: split {split!r}, files {sorted(files)}; splits are {', '.join(SAMPLINGS)}, all; "
            f"files are {', '.join(DEFAULT_FILES)}"
        )
    wanted = SAMPLINGS if split == "all" else (split,)
    return [question for sampling in wanted for question in _read_sampling(root, sampling, files)]


def _read_sampling(root: Path, sampling: str, files: dict[str, str]) -> list[Question]:
    path = root / files["annotations"].replace("{split}", sampling)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; name the file by files['annotations']") from error
    images = root / files["images"]
    rows = [(f"{path} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    questions = [_question(line, where, sampling, images) for where, line in rows]
    if len({question.id for question in questions}) < len(questions):
        raise DataError(f"{path}: the same question_id is given twice; ids must be unique")
    return questions


def _question(line: str, where: str, sampling: str, images: Path) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object is expected, got {line[:60]!r}")
    label = _text(row, "label", where).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{where}: key 'label' is {label!r}, 'yes' or 'no' is expected")
    return Question(
        id=f"{sampling}-{_text(row, 'question_id', where)}",
        question=_text(row, "text", where),
        images=(ImageRef.inside(images, _text(row, "image", where)),),
        answer=label,
        references=(label,),
        categories={"sampling": sampling},
    )


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(
            f"{where}: key {key!r} is {value!r}, a text is expected; keys there: {', '.join(row)}"
        )
    return str(value)
